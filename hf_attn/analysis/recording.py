"""Recording the attention maps of a model that usually computes without them."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: dimensions of an input with its batch, where they are not the two of tokens and their masks
_DIMENSIONS = {
    "pixel_values": 4,
    "pixel_mask": 3,
    "pixel_values_videos": 5,
    "input_features": 3,
    "inputs_embeds": 3,
    "decoder_inputs_embeds": 3,
    "bbox": 3,
}


def eager_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Put a model in eval mode with `attn_implementation="eager"`, which returns maps; restore both afterwards."""
    return attention_implementation(model, "eager")


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Put a model in eval mode with an attention implementation; restore both afterwards."""
    training = model.training
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    implementations = [(config, config._attn_implementation) for config in configs.values()]
    model.eval()
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        model.train(training)


def attention_maps(
    model: PreTrainedModel,
    dataset: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    description: str,
    progress: bool,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the maps of all layers, each `(batch, heads, q_len, kv_len)`, for each sample.

    The model computes with `attn_implementation="eager"` and in eval mode; both are restored at the end.

    Args:
        model: a decoder or an encoder of transformers.
        dataset: samples without padding: token ids `(sequence,)` or `(batch, sequence)`, dictionaries of the model's inputs,
            or texts.
        tokenizer: needed for texts.
        max_length: texts are cut to this many tokens.
        description: of the progress bar.
        progress: whether to show it.

    Raises:
        ValueError: if the model returns no attention maps, or a sample is padded or something else.
    """
    with torch.no_grad(), eager_attention(model):
        for sample in tqdm(dataset, desc=description, unit="sample", disable=not progress):
            # The frames of a video have as many dimensions as a batch of images.
            inputs = _model_inputs(sample, tokenizer, max_length, is_video=hasattr(model.config, "num_frames"))
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            attentions = getattr(model(**inputs, output_attentions=True), "attentions", None)
            if not attentions or any(layer is None for layer in attentions):
                raise ValueError(
                    f"{type(model).__name__} returns no attention maps, so they cannot be measured. It needs "
                    "a model whose `output_attentions=True` fills `attentions` with one softmax map per layer."
                )
            yield attentions


def _model_inputs(
    sample: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int, is_video: bool = False
) -> dict[str, torch.Tensor]:
    if isinstance(sample, str):
        if tokenizer is None:
            raise ValueError("The dataset contains texts: pass the model's tokenizer as well.")
        sample = tokenizer(sample, truncation=True, max_length=max_length)
    elif isinstance(sample, torch.Tensor | list | tuple):
        sample = {"input_ids": sample}
    try:
        inputs = {name: torch.as_tensor(value) for name, value in sample.items() if not name.startswith("label")}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "A sample must be token ids, a dictionary of model inputs, or a text with a tokenizer; got "
            f"{type(sample).__name__}: {error}"
        ) from error
    if not inputs or any(value.numel() == 0 for value in inputs.values()):
        raise ValueError("A sample is empty: a text or a sequence without tokens has no attention maps. Leave it out.")
    dimensions = {**_DIMENSIONS, "pixel_values": 5} if is_video else _DIMENSIONS
    inputs = {
        name: value[None] if value.dim() == dimensions.get(name, 2) - 1 else value for name, value in inputs.items()
    }
    if "attention_mask" in inputs and not inputs["attention_mask"].all():
        raise ValueError(
            "A sample is padded, so maps of padding would be compared. Pass sequences one at a time, without padding."
        )
    return inputs
