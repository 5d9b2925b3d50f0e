"""Several implementations of one attention function, and the choice among them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.call import AttentionCall, Refusal
from ..kernels.gpu_record import is_proven


def supports_every_call(call: AttentionCall) -> None:
    """The check of an implementation that refuses nothing."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an attention function.

    Attributes:
        name: last part of the registered name (`eager`, `torch`, `triton`, `flex`).
        compute: `(call, found) -> (output, weights | None)`; output `(batch, heads, q_len, value_dim)`, weights
            `(batch, heads, q_len, kv_len)`.
        check: `(call) -> found`: a [`Refusal`], or the result of the check, which is passed to `compute`.
        gpu_kernel: a kernel for GPUs. Automatic names use it only if it has passed `hf-attn check-gpu` on this GPU,
            see [`hf_attn.kernels.gpu_record`].
    """

    name: str
    compute: Callable[[AttentionCall, Any], tuple[torch.Tensor, torch.Tensor | None]]
    check: Callable[[AttentionCall], Any] = supports_every_call
    gpu_kernel: bool = False


@dataclass(frozen=True)
class AttentionFunction:
    """A function of a call, with its implementations.

    Attributes:
        name: of the function.
        implementations: in order of preference; the last one supports every call, and is the specification of the others.
        call: class of its calls.
    """

    name: str
    implementations: tuple[Implementation, ...]
    call: type[AttentionCall] = AttentionCall

    #: the name with which this class chooses the implementation
    automatic = "auto"
    #: the option by which users name an implementation
    option = "attn_implementation"
    #: implementations that are one call of PyTorch's softmax attention, as inexact as which any other may be
    yardsticks = ("dense", "sdpa")

    def name_of(self, implementation: Implementation) -> str:
        """The name of a pinned implementation."""
        return implementation.name

    @property
    def names(self) -> tuple[str, ...]:
        """Valid values of `attn_implementation`."""
        return tuple(dict.fromkeys((self.automatic, *map(self.name_of, self.implementations))))

    def implementation(self, name: str) -> Implementation | None:
        """The implementation that a name pins, None for the automatic one.

        Raises:
            ValueError: for a name that is none of [`names`].
        """
        if name == self.automatic:
            return None
        for implementation in self.implementations:
            if name == self.name_of(implementation):
                return implementation
        raise ValueError(
            f"{self.name} attention has no implementation {name!r}. Use one of {', '.join(map(repr, self.names))}."
        )

    def preferred(self, call: AttentionCall) -> tuple[Implementation, ...]:
        """The implementations that the automatic name tries, in this order."""
        # `eager` uses only standard operators of torch, which other runtimes support.
        return self.implementations[-1:] if torch.compiler.is_exporting() else self.implementations

    def choose(self, call: AttentionCall, name: str | None = None) -> tuple[Implementation, Any]:
        """The implementation for a call, and the result of its check.

        Args:
            call: of the function.
            name: one of [`names`]; the automatic one by default.

        Raises:
            ValueError: for an unknown name, and if the pinned implementation does not support the call.
        """
        pinned = None if name is None else self.implementation(name)
        candidates = self.preferred(call) if pinned is None else (pinned,)
        for implementation in candidates:
            if pinned is None and implementation.gpu_kernel and not self._is_proven(implementation, call):
                continue
            found = implementation.check(call)
            if not isinstance(found, Refusal):
                return implementation, found
        others = (other for other in self.preferred(call) if other is not implementation)
        can = pinned is not None and any(not isinstance(other.check(call), Refusal) for other in others)
        raise ValueError(
            f"{self.option}={self.name_of(implementation)!r} does not support this call: {found.reason}."
            + (f" Use {self.option}={self.automatic!r}, which chooses an implementation that does." if can else "")
        )

    def __call__(
        self, call: AttentionCall, attn_implementation: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a call.

        Args:
            call: of the function.
            attn_implementation: one of [`names`]; the automatic one by default.

        Returns:
            Output `(batch, heads, q_len, value_dim)`, and weights `(batch, heads, q_len, kv_len)` if the implementation
            has them.

        Raises:
            ValueError: for an unknown name, and if the pinned implementation does not support the call.
        """
        implementation, found = self.choose(call, attn_implementation)
        return implementation.compute(call, found)

    def _is_proven(self, implementation: Implementation, call: AttentionCall) -> bool:
        device = call.query.device
        # The CPU runs a kernel under triton's interpreter only, to test it.
        return device.type != "cpu" and is_proven(f"{self.name}_{implementation.name}", device, call.query.dtype)
