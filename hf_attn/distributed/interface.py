"""Distributed attention for transformers' attention interface, registered as `distributed_<layout>`."""

import torch
from torch import nn

from ..attention.interface import RESULT_CHANGING_ARGUMENTS
from .context import active


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of this rank's tokens, with the signature of transformers; the layout is that of the context.

    Raises:
        ValueError: for arguments that change the result: masks, dropout, a window, a soft cap.
        RuntimeError: outside of [`~hf_attn.distributed.context.sequence_parallel`].
    """
    context = active()
    name = f"distributed_{context.layout}"
    refused = [x for x in (*RESULT_CHANGING_ARGUMENTS, "sliding_window") if kwargs.get(x) is not None]
    if attention_mask is not None:
        refused.append("a mask of its own")
    if dropout:
        refused.append(f"dropout of {dropout}")
    if refused:
        raise ValueError(
            f"attn_implementation={name!r} does not support {', '.join(refused)}, which {type(module).__name__} "
            "passes and which would change the result."
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    output = context.attend(query, key, value, bool(causal), query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> None:
    """No mask: padding and documents are part of the context, which is the same on all ranks.

    Raises:
        ValueError: for padding that was not given to `shard`, a window, or a mask function of the model's own.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "The model was called with a mask that the other ranks do not have. Call it as `model(**shard(batch))`."
        )
    if local_size is not None:
        raise ValueError(f"Distributed attention does not support the model's window of {local_size} tokens.")
    if use_vmap:
        raise ValueError("Distributed attention does not support the model's own mask function.")
