"""Who can compute an attention call, and the call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_attn.kernels.disentangled.blocks import blockwise_disentangled, dense_disentangled
from hf_attn.kernels.disentangled.eager import eager_disentangled
from hf_attn.kernels.disentangled.flex import flex_disentangled
from hf_attn.kernels.disentangled.packages import disentangled_flash, flashdeberta, is_installed


@dataclass(frozen=True)
class AttentionCall:
    """One call of disentangled attention, with all that decides who can serve it.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, heads, kv_len, head_dim)`.
        value: `(batch, heads, kv_len, head_dim)`.
        position_key: `(heads, rows, head_dim)` or none, see ``eager_disentangled``.
        position_query: `(heads, rows, head_dim)` or none.
        rows: row of every distance, `(2 * length - 1,)`; none if positions were given pair by pair or a graph is captured.
        index: row of each pair, made when it is asked for.
        attention_mask: boolean `(batch, 1, 1 or q_len, kv_len)` or none.
        scaling: factor of all terms.
        dropout: of the attention weights, 0 in eval mode.
        buckets: `position_buckets`.
        max_distance: `max_relative_positions`.
        hf_compat: distances beyond the table as in transformers.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_key: torch.Tensor | None
    position_query: torch.Tensor | None
    rows: torch.Tensor | None
    index: Callable[[], torch.Tensor]
    attention_mask: torch.Tensor | None
    scaling: float
    dropout: float
    buckets: int = -1
    max_distance: int = 0
    hf_compat: bool = False

    @property
    def has_positions(self) -> bool:
        return self.position_key is not None or self.position_query is not None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.query, self.key, self.value, self.position_key, self.position_query

    @property
    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in self.tensors)


def _serves(call: AttentionCall) -> tuple[bool, str]:
    return True, ""


def run_eager(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    return eager_disentangled(*call.tensors, call.index(), call.attention_mask, call.scaling, call.dropout)


def _run_torch(call: AttentionCall) -> torch.Tensor:
    if call.rows is None or call.needs_gradients or call.dropout or not call.has_positions:
        return dense_disentangled(*call.tensors, call.index(), call.attention_mask, call.scaling, call.dropout)
    return blockwise_disentangled(*call.tensors, call.rows, call.attention_mask, call.scaling)


def _flex_serves(call: AttentionCall) -> tuple[bool, str]:
    if call.dropout:
        return False, "FlexAttention has no dropout (attention_probs_dropout_prob = 0 trains without)"
    if call.query.device.type == "cpu" and call.needs_gradients:
        return False, "FlexAttention has no gradients on a CPU"
    return True, ""


def _run_flex(call: AttentionCall) -> torch.Tensor:
    index = call.index() if call.rows is None else call.rows
    return flex_disentangled(*call.tensors, index, call.attention_mask, call.scaling)


def _kernel_serves(call: AttentionCall, package: str, name: str) -> tuple[bool, str]:
    if not is_installed(package):
        return False, f"the package {name} is not installed; the extra `deberta-cuda` of hf_attn installs it"
    if call.query.device.type != "cuda":
        return False, f"{name} runs on CUDA, and the model is on {call.query.device.type}"
    if call.rows is None:
        return False, f"{name} takes no positions pair by pair and is not part of a compiled or exported graph"
    if not call.has_positions:
        return False, "the model has no relative positions"
    if call.attention_mask is not None and call.attention_mask.shape[2] != 1:
        return False, f"{name} takes a mask of keys, not of pairs"
    return True, ""


def _disentangled_flash_serves(call: AttentionCall) -> tuple[bool, str]:
    if call.query.shape[-1] not in (32, 64, 128):
        return False, f"disentangled-flash has heads of 32, 64 or 128, not {call.query.shape[-1]}"
    return _kernel_serves(call, "disentangled_flash", "disentangled-flash")


def _flashdeberta_serves(call: AttentionCall) -> tuple[bool, str]:
    ok, reason = _kernel_serves(call, "flashdeberta", "flashdeberta")
    if not ok:
        return ok, reason
    if call.dropout:
        return False, "flashdeberta has no dropout"
    if call.buckets > 0 and not call.hf_compat and call.query.shape[2] > call.max_distance:
        return False, (
            f"flashdeberta treats distances beyond {call.max_distance - 1} as transformers does; set hf_compat=True to "
            "accept that"
        )
    mask = call.attention_mask
    if mask is not None and not (mask[..., 1:] <= mask[..., :-1]).all():
        return False, "flashdeberta takes padding on the right only"
    return True, ""


def _run_disentangled_flash(call: AttentionCall) -> torch.Tensor:
    return disentangled_flash(*call.tensors, call.rows, call.attention_mask, call.scaling, call.dropout)


def _run_flashdeberta(call: AttentionCall) -> torch.Tensor:
    return flashdeberta(*call.tensors, call.attention_mask, call.scaling, call.buckets, call.max_distance)


@dataclass(frozen=True)
class Implementation:
    """How to compute a call, and the check `call -> (ok, reason)` of whether it can be.

    Attributes:
        run: computes the output.
        serves: says whether it can.
        package: what has to be installed for it, as it is imported.
        whole_table: it takes the whole table of positions and finds the rows by itself.
    """

    run: Callable[[AttentionCall], torch.Tensor]
    serves: Callable[[AttentionCall], tuple[bool, str]]
    package: str | None = None
    whole_table: bool = False


IMPLEMENTATIONS = {
    "eager": Implementation(lambda call: run_eager(call)[0], _serves),
    "torch": Implementation(_run_torch, _serves),
    "flex": Implementation(_run_flex, _flex_serves),
    "disentangled_flash": Implementation(_run_disentangled_flash, _disentangled_flash_serves, "disentangled_flash"),
    "flashdeberta": Implementation(_run_flashdeberta, _flashdeberta_serves, "flashdeberta", whole_table=True),
}
_AUTO = {"cuda": ("disentangled_flash", "flex", "torch")}


def choose(implementation: str, call: AttentionCall) -> Callable[[AttentionCall], torch.Tensor]:
    """The function for a call; `"auto"` takes the first that can serve it.

    Raises:
        ValueError: if the implementation that was named cannot; the message says why.
    """
    if implementation != "auto":
        ok, reason = IMPLEMENTATIONS[implementation].serves(call)
        if not ok:
            raise ValueError(
                f"implementation={implementation!r} cannot serve this call: {reason}. Use implementation='auto', which "
                "picks one that can."
            )
        return IMPLEMENTATIONS[implementation].run
    candidates = _AUTO.get(call.query.device.type, ("torch",))
    name = next(name for name in candidates if IMPLEMENTATIONS[name].serves(call)[0])
    return IMPLEMENTATIONS[name].run
