"""How a mechanism with several implementations becomes functions of transformers' attention interface.

A :class:`Mechanism` is registered as ``"<mechanism>"``, which takes the first implementation that supports the call,
and as ``"<mechanism>_<backend>"``, which pins one and raises if it cannot serve the call. What a name means never
depends on which implementation computes it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import sdpa_mask


#: keyword arguments by which some models of transformers change what their attention computes
RESULT_CHANGING_ARGUMENTS = (
    "softcap",
    "s_aux",
    "position_bias",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cache",
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a mechanism.

    Attributes:
        backend: last part of the registered name (``eager``, ``torch``, ``triton``, ``flex``).
        function: ``(query, key, value, **arguments) -> (output, weights | None)``; query ``(batch, heads, q_len,
            head_dim)``, key and value ``(batch, kv_heads, kv_len, head_dim)``, output ``(batch, heads, q_len,
            head_dim)``, weights ``(batch, heads, q_len, kv_len)``.
        supports: the same arguments -> ``(ok, reason)``.
    """

    backend: str
    function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    supports: Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Mechanism:
    """An attention mechanism and its implementations, the preferred one first.

    Attributes:
        name: registered name that chooses by itself.
        implementations: in order of preference; the last one serves every call.
        arguments: ``(module, query, key, value, keyword arguments of the call) -> arguments of the implementations``.
            Takes what it serves out of the keyword arguments, and so decides what is refused.
        mask_function: creates the mask in the form that the implementations take.
    """

    name: str
    implementations: tuple[Implementation, ...]
    arguments: Callable[..., dict]
    mask_function: Callable = sdpa_mask

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}_{implementation.backend}" for implementation in self.implementations))

    def attention_function(self, name: str) -> Callable:
        """The function registered under ``name`` (one of :attr:`names`), with transformers' attention signature."""
        pinned = [i for i in self.implementations if name == f"{self.name}_{i.backend}"]

        def attention_forward(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float | None = None,
            dropout: float = 0.0,
            is_causal: bool | None = None,
            sliding_window: int | None = None,
            **kwargs,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            # Under the convention of `sdpa_mask` a missing mask means: causal if there are several queries, the first of
            # which is at position 0 (further keys are unused slots of a static cache), else all keys.
            is_causal = bool(is_causal) and query.shape[2] > 1 and attention_mask is None
            if is_causal and key.shape[2] > query.shape[2]:
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            arguments = {
                "attention_mask": attention_mask,
                "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
                "is_causal": is_causal,
                # A mask made by transformers holds the window already.
                "sliding_window": sliding_window if attention_mask is None else None,
                "dropout": dropout,
                "output_weights": bool(kwargs.pop("output_attentions", False)),
                **self.arguments(module, kwargs),
            }
            refused = [name for name in RESULT_CHANGING_ARGUMENTS if kwargs.get(name) is not None]
            if refused:
                raise ValueError(
                    f"attn_implementation={name!r} does not serve {', '.join(refused)}, which "
                    f"{type(module).__name__} asks for and which would change the result. Use the model's own "
                    "attn_implementation ('eager' or 'sdpa')."
                )
            output, weights = self._choose(pinned, query, key, value, arguments)(query, key, value, **arguments)
            return output.transpose(1, 2).contiguous(), weights

        attention_forward.__name__ = f"{name}_attention_forward"
        return attention_forward

    def _choose(self, pinned: list[Implementation], query, key, value, arguments: dict) -> Callable:
        for implementation in pinned or self.implementations:
            ok, reason = implementation.supports(query, key, value, **arguments)
            if ok:
                return implementation.function
        raise ValueError(
            f"attn_implementation='{self.name}_{implementation.backend}' cannot serve this call: {reason}. Use "
            f"attn_implementation={self.name!r}, which picks an implementation that can."
        )


def uses_attention(model: nn.Module, name: str) -> None:
    """Check that ``model`` really calls the attention function that its configuration names.

    Many models of transformers accept any registered ``attn_implementation`` and never look at it.

    Args:
        model: a transformers model.
        name: the name passed as ``attn_implementation``.

    Raises:
        ValueError: if the configuration holds another name, or if no module of the model goes through transformers'
            attention interface.
    """
    configured = model.config._attn_implementation
    if configured != name:
        raise ValueError(
            f"{type(model).__name__} is configured with attn_implementation={configured!r}, not {name!r}. Load it with "
            f"`from_pretrained(..., attn_implementation={name!r})` or call `model.set_attn_implementation({name!r})`."
        )
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", uses_attention.__code__).co_names:
            return
    raise ValueError(
        f"{type(model).__name__} ignores attn_implementation: its attention does not go through transformers' attention "
        f"interface, so {name!r} would be accepted and never called. Use a model that does, such as Llama, Qwen2, "
        "Mistral, BERT or ViT."
    )
