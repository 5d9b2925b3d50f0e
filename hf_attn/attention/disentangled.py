"""Disentangled attention of DeBERTa (arXiv 2006.03654), see [`hf_attn.kernels.disentangled.eager`] for the equation."""

import torch

from ..kernels.disentangled.blocks import blockwise_disentangled, dense_disentangled
from ..kernels.disentangled.call import DisentangledCall
from ..kernels.disentangled.eager import eager_disentangled
from ..kernels.disentangled.flex import check_flex, flex_disentangled
from ..kernels.disentangled.packages import (
    check_disentangled_flash,
    check_flashdeberta,
    disentangled_flash,
    flashdeberta,
)
from .dispatch import AttentionFunction, Implementation


#: implementations that a package computes, by the name that it is imported by
PACKAGES = ("disentangled_flash", "flashdeberta")
#: takes the whole table of positions and finds the rows itself
TAKES_WHOLE_TABLE = "flashdeberta"


def _torch(call: DisentangledCall, found: None) -> tuple[torch.Tensor, None]:
    blockwise = call.rows is not None and call.has_positions and not (call.needs_gradient or call.dropout)
    return (blockwise_disentangled if blockwise else dense_disentangled)(call), None


class _DisentangledAttention(AttentionFunction):
    option = "implementation"
    yardsticks = ("torch",)

    def preferred(self, call: DisentangledCall) -> tuple[Implementation, ...]:
        # SDPA is exported as well: without the weights the graph needs less memory.
        names = ("disentangled_flash", "flex", "torch") if call.query.device.type == "cuda" else ("torch",)
        return tuple(map(self.implementation, names))


DISENTANGLED = _DisentangledAttention(
    name="disentangled",
    call=DisentangledCall,
    implementations=(
        Implementation("disentangled_flash", disentangled_flash, check_disentangled_flash),
        Implementation("flashdeberta", flashdeberta, check_flashdeberta),
        Implementation("flex", flex_disentangled, check_flex, gpu_kernel=True),
        Implementation("torch", _torch),
        Implementation("eager", eager_disentangled),
    ),
)
