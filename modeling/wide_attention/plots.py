"""Attention of a class token, as numbers and drawn over the text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_attn.analysis.figures import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def attention_over_text(
    model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", text: str, layer: int = -1
) -> tuple[list[str], torch.Tensor]:
    """Attention of the class token to each token of a text, in every head.

    Args:
        model: a wide transformer with a class token whose attention weights single tokens.
        tokenizer: its tokenizer.
        text: the text; it is not truncated.
        layer: which layer; a wide model has one.

    Returns:
        The tokens as they stand in the text, those behind the first one of a character of several bytes empty; and weights
        `(heads, tokens)`. The difference of a row's sum to 1 is the weight of the class token itself.

    Raises:
        ValueError: if the model has no class token or no weights of single tokens.
    """
    if model.config.pooling != "cls":
        raise ValueError(f"The model has no class token (pooling={model.config.pooling!r}).")
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    implementation, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    if not attentions or attentions[layer] is None:
        raise ValueError(
            f"attention_type={model.config.attention_type!r} has no weights for single tokens, so there is nothing to "
            "plot."
        )
    ids = inputs["input_ids"][0]
    if encoding := inputs.encodings:
        spans = encoding[0].offsets
        tokens = ["" if index and span == spans[index - 1] else text[slice(*span)] for index, span in enumerate(spans)]
    else:
        tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokens, attentions[layer][0, :, 0, 1:].float().cpu()


def plot_attention_over_text(
    tokens: Sequence[str], weights: torch.Tensor, heads: Sequence[int] | None = None, width: int = 80
) -> "Figure":
    """Draw a text once for each head, with tokens shaded by their weight.

    Args:
        tokens: tokens of the text.
        weights: `(heads, tokens)`, see [`attention_over_text`]; each head is shaded relative to its largest weight.
        heads: which heads; all if not given.
        width: characters in a line.

    Returns:
        The figure; `figure.savefig("attention.png")` saves it.

    Raises:
        ValueError: if tokens and weights do not belong together, or there is no such head.
    """
    if weights.ndim != 2 or weights.shape[1] != len(tokens) or not len(tokens):
        raise ValueError(
            f"weights must have the shape (heads, tokens) for {len(tokens)} tokens, got {tuple(weights.shape)}."
        )
    heads = range(len(weights)) if heads is None else heads
    wrong = [head for head in heads if not 0 <= head < len(weights)]
    if wrong:
        raise ValueError(f"Heads {wrong} are out of range: the layer has {len(weights)} heads.")
    if width < 1:
        raise ValueError(f"width must be positive, got {width}.")
    places, num_lines = _places(tokens, width)
    figure = new_figure(0.1 * width + 0.8, (0.22 * num_lines + 0.3) * max(len(heads), 1))
    axes = figure.subplots(len(heads), 1, squeeze=False)[:, 0]
    for head, axis in zip(heads, axes, strict=True):
        grid = torch.zeros(num_lines, width)
        largest = weights[head].max().clamp(min=torch.finfo(weights.dtype).tiny)
        for (line, column, shown), weight in zip(places, (weights[head] / largest).tolist(), strict=True):
            grid[line, column : column + len(shown)] = weight
            axis.text(column, line, shown, family="monospace", fontsize=7, va="center", ha="left", parse_math=False)
        axis.imshow(
            grid.numpy(), cmap="Oranges", vmin=0, vmax=1, aspect="auto", extent=(0, width, num_lines - 0.5, -0.5)
        )
        axis.set_ylabel(f"head {head}", fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _places(tokens: Sequence[str], width: int) -> tuple[list[tuple[int, int, str]], int]:
    """Line, column and shown text of each token, and the number of lines."""
    places, line, column = [], 0, 0
    for token in tokens:
        shown = token.replace("\n", "⏎").replace("\t", " ")[:width] or "·"
        if column + len(shown) > width:
            line, column = line + 1, 0
        places.append((line, column, shown))
        column += len(shown)
    return places, line + 1
