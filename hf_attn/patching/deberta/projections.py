"""The projections of the table of relative positions, kept between calls as long as they cannot have changed.

They are constants of the weights, independent of the text, and at short lengths most of the work of the attention.
"""

from collections.abc import Hashable

import torch
from torch import nn


def _bits(tensor: torch.Tensor) -> int:
    """A sum over the bits of a tensor; it detects changes through `.data`, which do not change the version of a tensor."""
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return int(flat.view(torch.int64).sum())
    return int(flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).sum())


def _identity(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), _bits(tensor)


def is_capturing_graph() -> bool:
    """Whether the call is being compiled, exported or traced: no Python state may decide anything then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class PositionProjections:
    """Cache of one attention module: name of the projection -> inputs and result.

    It is never copied or pickled with the module.
    """

    def __init__(self):
        self._kept: dict[str, tuple[Hashable, torch.Tensor]] = {}

    def __reduce__(self):
        return PositionProjections, ()

    def __deepcopy__(self, memo):
        return PositionProjections()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def get(self, name: str, linear: nn.Module, table: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Rows `first, ..., first + count - 1` of `linear(table)`, `(count, features)`.

        Args:
            name: of the projection.
            linear: the projection; only a plain `nn.Linear` on a CPU is cached, in eval mode and without gradients.
            table: the table of relative positions, `(rows, hidden_size)`.
            first: first row.
            count: number of rows.
        """
        if not self._can_keep(linear, table):
            self._kept.pop(name, None)
            return linear(table[first : first + count])
        # The table may be the output of a LayerNorm, with another address in every call: its bits say whether it changed.
        source = (
            _identity(linear.weight),
            None if linear.bias is None else _identity(linear.bias),
            (table.dtype, tuple(table.shape), _bits(table)),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        )
        kept = self._kept.get(name)
        if kept is None or kept[0] != source:
            # A tensor made in inference mode could not be part of a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[name] = source, linear(table)
        return kept[1][first : first + count]

    @staticmethod
    def _can_keep(linear: nn.Module, table: torch.Tensor) -> bool:
        if is_capturing_graph() or linear.training or type(linear) is not nn.Linear:
            return False
        if linear._forward_hooks or linear._forward_pre_hooks or hasattr(linear, "_hf_hook"):
            return False
        sources = [tensor for tensor in (linear.weight, linear.bias, table) if tensor is not None]
        if any(type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu" for tensor in sources):
            return False
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources))
