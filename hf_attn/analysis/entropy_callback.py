"""Monitors the entropy of attention during training (arXiv 2303.06296), whose collapse precedes divergence."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from .entropy import attention_entropy, entropy_lower_bound
from .figures import new_figure
from .recording import eager_attention


logger = logging.get_logger(__name__)

#: names of the query and key projections in models of transformers and timm; a fused projection counts as both
QUERY_NAMES = ("q_proj", "query", "qkv", "q_lin")
KEY_NAMES = ("k_proj", "key", "qkv", "k_lin")

_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}


class AttentionEntropyCallback(TrainerCallback):
    """Trainer callback that logs the entropy of attention per layer and head on a fixed batch, and warns of its collapse.

    Every `every_steps` steps it runs one forward pass without gradients in eval mode with `attn_implementation="eager"`
    on the batch. Its cost is that pass, whose memory holds all attention maps (`layers * batch * heads * q_len * kv_len`
    numbers), and one singular value decomposition of the query and key projections of each layer; a step of training costs
    about three forward passes, so every 50 steps with a batch of the size of training add less than 1 % .

    The Trainer's `state.log_history` gets `attention_entropy` (mean over layers), `attention_entropy_min` (lowest head) and,
    where the projections of queries and keys are found and nothing normalises what they give, `attention_entropy_bound`
    (the largest lower bound of the layers); everything is kept in `history`.

    Args:
        batch: inputs of the model, as tensors or nested lists with a batch dimension. Labels are ignored, but an
            encoder-decoder without `decoder_input_ids` makes them of the labels. Rows of attention that see padding count
            as well. Of an encoder-decoder the layers are those of the encoder, of the decoder, and the cross-attentions.
        every_steps: steps between measurements.
        collapse_below: warn when the mean entropy of a layer falls below this fraction of the entropy of uniform
            attention (for causal models the uniform attention over the keys that each row may see).

    Attributes:
        history: one dictionary a measurement: `step`, `entropy` (layers x heads nested lists, in nats), `bound` (one
            number per layer; None where it is not known), `uniform` (entropy of uniform attention).
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], every_steps: int = 50, collapse_below: float = 0.05):
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}.")
        if not 0 < collapse_below < 1:
            raise ValueError(f"collapse_below must be between 0 and 1, got {collapse_below}.")
        if not isinstance(batch, Mapping):
            raise ValueError(f"batch must be a dictionary of the inputs of the model, got {type(batch).__name__}.")
        try:
            self.batch = {name: torch.as_tensor(value) for name, value in batch.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The inputs in batch must be tensors or rectangular lists of numbers: {error}"
            ) from error
        self.every_steps = every_steps
        self.collapse_below = collapse_below
        self.history: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measure the model as it starts."""
        self._log(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure every `every_steps` steps."""
        if state.global_step % self.every_steps == 0:
            self._log(state, model)

    def _log(self, state, model: nn.Module) -> None:
        entry = self.measure(model, state.global_step)
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, **summary(entry)})

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int) -> dict:
        """Measure now.

        Args:
            model: the model; wrappers of distributed training are looked through.
            step: number of the step to record.

        Returns:
            The entry that was added to `history`.

        Raises:
            ValueError: if the model returns no attention maps.
        """
        model = getattr(model, "module", model)
        device = next(model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self.batch.items() if not name.startswith("label")}
        if getattr(model.config, "is_encoder_decoder", False) and not inputs.keys() & _DECODER_INPUTS:
            if "labels" not in self.batch:
                raise ValueError("batch needs decoder_input_ids or labels: the model is an encoder-decoder.")
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(self.batch["labels"].to(device))
        layers = _attention_layers(model)
        norms: dict[nn.Module, float] = {}
        handles = [layer.register_forward_pre_hook(_input_norm(norms), with_kwargs=True) for layer in layers]
        try:
            # In eval mode throughout: reparametrised projections must not move their singular vectors.
            with eager_attention(model):
                attentions, bounded = _attentions(model(**inputs, output_attentions=True))
                logit_norms = [_logit_norm(layer, norms[layer]) for layer in layers if layer in norms]
        finally:
            for handle in handles:
                handle.remove()
        if not attentions or any(attention is None for attention in attentions):
            raise ValueError(
                f"{type(model).__name__} returns no attention maps with output_attentions=True, so their entropy cannot be "
                "watched."
            )
        visible = [(attention > 0).sum(-1).clamp(min=1) for attention in attentions]
        entry = {
            "step": step,
            "entropy": [attention_entropy(attention).mean(dim=(0, 2)).tolist() for attention in attentions],
            "bound": [None] * len(attentions),
            "uniform": sum(count.float().log().mean().item() for count in visible) / len(visible),
        }
        if bounded and len(logit_norms) == len(attentions):
            entry["bound"] = [
                None if norm is None else entropy_lower_bound(norm, keys).mean().item()
                for norm, keys in zip(logit_norms, visible, strict=True)
            ]
        self.history.append(entry)
        self._warn(entry)
        return entry

    def _warn(self, entry: dict) -> None:
        for layer, heads in enumerate(entry["entropy"]):
            mean = sum(heads) / len(heads)
            if not math.isfinite(mean):
                logger.warning(
                    f"Step {entry['step']}: the attention of layer {layer} is not finite: training has diverged."
                )
            elif mean < self.collapse_below * entry["uniform"]:
                logger.warning(
                    f"Step {entry['step']}: the attention of layer {layer} has collapsed: mean entropy {mean:.3f} nats, "
                    f"uniform attention has {entry['uniform']:.3f}. Lower the learning rate, or train with "
                    "`apply_sigma_reparam`."
                )

    def save(self, path: str | Path) -> None:
        """Write `history` as JSON."""
        Path(path).write_text(json.dumps(self.history, indent=1), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw the mean entropy of each layer over the steps.

        Args:
            path: file to write; its suffix sets the format.

        Raises:
            ValueError: if nothing has been measured yet.
            ImportError: if matplotlib (the extra `plot`) is not installed.
        """
        if not self.history:
            raise ValueError("Nothing has been measured yet: train with the callback, or call `measure`.")
        figure = new_figure(7, 4)
        from matplotlib import colormaps  # there, or the line above has warned

        axes = figure.add_subplot()
        steps = [entry["step"] for entry in self.history]
        num_layers = len(self.history[0]["entropy"])
        for layer in range(num_layers):
            means = [sum(entry["entropy"][layer]) / len(entry["entropy"][layer]) for entry in self.history]
            axes.plot(steps, means, color=colormaps["viridis"](layer / max(1, num_layers - 1)), label=f"layer {layer}")
        axes.axhline(self.history[-1]["uniform"], color="grey", linestyle=":", label="uniform attention")
        axes.set(xlabel="step", ylabel="mean entropy of attention (nats)", ylim=(0, None))
        if num_layers <= 12:
            axes.legend(fontsize="small", ncols=2)
        figure.savefig(path, dpi=150)


def _attentions(outputs) -> tuple[tuple[torch.Tensor, ...], bool]:
    """Attention maps of all layers, and whether the bound holds for them.

    The keys of cross-attention are computed from another sequence than its queries, and the order of modules differs.
    """
    if getattr(outputs, "attentions", None):
        return outputs.attentions, True
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    return tuple(layer for name in names for layer in (getattr(outputs, name, None) or ())), False


def summary(entry: dict) -> dict[str, float]:
    """The values of a measurement that are logged."""
    heads = [head for layer in entry["entropy"] for head in layer]
    bounds = [bound for bound in entry["bound"] if bound is not None]
    logged = {"attention_entropy": sum(heads) / len(heads), "attention_entropy_min": min(heads)}
    if bounds:
        logged["attention_entropy_bound"] = max(bounds)
    return logged


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children and hasattr(children[name], "weight")), None)


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """Layers whose logits the norms of their projections bound: a norm between the two lifts the bound."""
    return [
        module
        for module in model.modules()
        if _child(module, QUERY_NAMES) and _child(module, KEY_NAMES) and not _child(module, ("q_norm", "query_norm"))
    ]


def _input_norm(norms: dict[nn.Module, float]):
    def hook(module, arguments, keywords):
        hidden_states = arguments[0] if arguments else keywords["hidden_states"]
        # A bias is one more column of the weight, which meets a constant 1 in the input.
        ones = torch.ones_like(hidden_states[..., :1])
        rows = torch.cat((hidden_states, ones), dim=-1).float()
        norms[module] = torch.linalg.matrix_norm(rows, ord=2).max().item() if rows.isfinite().all() else math.inf

    return hook


def _logit_norm(layer: nn.Module, input_norm: float) -> float | None:
    """Bound on the norm of a row of logits: scale * ||W_Q|| ||W_K|| ||X||^2 (rotary embeddings change no norm).

    None if a weight or the input is not finite.
    """
    norm = 1.0
    for name, names in (("query", QUERY_NAMES), ("key", KEY_NAMES)):
        projection = _child(layer, names)
        weight = projection.effective_weight() if hasattr(projection, "effective_weight") else projection.weight
        bias = projection.bias if projection.bias is not None else torch.zeros_like(weight[:, 0])
        matrix = torch.cat((weight, bias[:, None]), dim=1).float()
        if weight.shape[0] == 3 * weight.shape[1]:
            matrix = matrix.chunk(3)[0 if name == "query" else 1]
        if not matrix.isfinite().all():
            return None
        norm *= torch.linalg.matrix_norm(matrix, ord=2).item()
    scaling = getattr(layer, "scaling", None) or getattr(layer, "scale", None)
    if scaling is None:
        head_dim = getattr(layer, "attention_head_size", None) or getattr(layer, "head_dim", 1)
        scaling = head_dim**-0.5
    norm *= scaling * input_norm**2
    return norm if math.isfinite(norm) else None
