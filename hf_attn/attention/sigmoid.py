"""Sigmoid attention (arXiv 2409.04431): an element-wise sigmoid in the place of the softmax.

    P_ij = sigmoid(scaling * q_i . k_j - slope * |i - j| + b)  for allowed pairs, exactly 0 for masked ones;  O = P V

Nothing is normalised: rows of P do not sum to one, and a query that may see no key gets zeros. The bias ``b`` is a
constant of training, ``-log(n)`` for training sequences of length ``n``; it depends neither on the length at hand, nor
on padding, nor on the step of decoding.
"""

import math

import torch
from torch import nn
from transformers.utils import logging

from ..kernels.sigmoid.blockwise import sigmoid_attention_blockwise, supports_blockwise
from .interface import Implementation, Mechanism


logger = logging.get_logger(__name__)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes of ALiBi, one for each head: geometric with ratio ``2 ** (-8 / num_heads)``.

    If ``num_heads`` is no power of two, the slopes of the lower power of two are followed by every second one of twice
    that power.

    Returns:
        float32 tensor of shape ``(num_heads,)``.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(power) + geometric(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def sigmoid_weights(logits: torch.Tensor, normalization: str | None = None) -> torch.Tensor:
    """Attention weights from final logits (scaled, masked and biased).

    Args:
        logits: ``(..., q_len, kv_len)``.
        normalization: ``None``; ``"row"`` divides row ``i`` (counted from 1) by ``i``, its number of causal keys;
            ``"sqrt_row"`` by ``sqrt(i)``. The two alternatives are for causal attention without a cache, where
            ``q_len == kv_len``.

    Returns:
        Weights of the same shape.

    Raises:
        ValueError: for another ``normalization``, or if the logits are not square where they have to be.
    """
    weights = torch.sigmoid(logits)
    if normalization is None:
        return weights
    if normalization not in ("row", "sqrt_row"):
        raise ValueError(f"normalization must be None, 'row' or 'sqrt_row', got {normalization!r}.")
    q_len, kv_len = logits.shape[-2:]
    if q_len != kv_len:
        raise ValueError(
            f"normalization={normalization!r} counts the causal keys of a row and needs as many queries as keys, got "
            f"{q_len} queries and {kv_len} keys."
        )
    count = torch.arange(1, q_len + 1, dtype=weights.dtype, device=weights.device)[:, None]
    return weights / (count if normalization == "row" else count.sqrt())


def sigmoid_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    bias: float | torch.Tensor = 0.0,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    dropout: float = 0.0,
    output_weights: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid attention as the equation reads; the specification of the other implementations.

    Args:
        query: ``(batch, heads, q_len, head_dim)``.
        key: ``(batch, kv_heads, kv_len, head_dim)``; head ``h`` uses key/value head ``h // (heads // kv_heads)``.
        value: ``(batch, kv_heads, kv_len, value_dim)``.
        scaling: factor of the logits.
        bias: ``b``, one number or one for each head ``(heads,)``; it is not scaled.
        attention_mask: broadcastable to ``(batch, heads, q_len, kv_len)``; boolean (``True``: may attend) or additive,
            where entries at half of the dtype's minimum or below mean masked.
        is_causal: a query sees the keys up to its own position.
        sliding_window: a query sees the keys less than this far from its position.
        alibi_slopes: ``(heads,)`` or ``(batch, heads)``, slope of the penalty on the distance in tokens.
        query_offset: position of the first query among the keys; ``kv_len - q_len`` if not given.
        dropout: probability of dropping a weight.
        output_weights: accepted for all implementations; the weights are returned anyway.

    Returns:
        Output ``(batch, heads, q_len, value_dim)`` and weights ``(batch, heads, q_len, kv_len)``, both in the dtype of
        the query. Logits and sigmoid are computed in float32 (or in float64 for float64 input).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    precision = torch.promote_types(query.dtype, torch.float32)
    logits = (query @ key.transpose(-1, -2)).to(precision) * scaling

    q_len, kv_len = logits.shape[-2:]
    offset = kv_len - q_len if query_offset is None else query_offset
    q_position = torch.arange(q_len, device=query.device)[:, None] + offset
    distance = q_position - torch.arange(kv_len, device=query.device)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        allowed = distance >= 0
    if sliding_window is not None:
        allowed = allowed & (distance.abs() < sliding_window)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(precision)[..., None, None] * distance.abs()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        allowed = allowed & attention_mask
    elif attention_mask is not None:
        allowed = allowed & (attention_mask > torch.finfo(attention_mask.dtype).min / 2)
        logits = logits + attention_mask

    if isinstance(bias, torch.Tensor):
        bias = bias.to(precision)[..., None, None]
    weights = sigmoid_weights(logits + bias).masked_fill(~allowed, 0.0).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout) @ value
    return output, weights


def _supports_eager(query, key, value, **arguments) -> tuple[bool, str]:
    return True, ""


def _sigmoid_attention_triton(query, key, value, **arguments):
    from ..kernels.sigmoid.triton import sigmoid_attention_triton

    return sigmoid_attention_triton(query, key, value, **arguments)


def _supports_triton(query, key, value, **arguments) -> tuple[bool, str]:
    from ..kernels.triton_support import supports_sigmoid_triton

    return supports_sigmoid_triton(query, key, value, **arguments)


def _without_weights(function):
    """Adapts a fused kernel, which takes neither of the two arguments that it cannot serve."""

    def fused(query, key, value, *, dropout, output_weights, **arguments):
        return function(query, key, value, **arguments), None

    return fused


def default_sigmoid_bias(config) -> float:
    """The bias that the paper recommends, ``-log(n)`` for the longest sequence ``n`` that a model is trained on.

    Args:
        config: configuration of any transformers model. ``n`` is its ``max_position_embeddings`` or, for images, the
            number of patches.

    Raises:
        ValueError: if the configuration tells neither.
    """
    length = getattr(config, "max_position_embeddings", None)
    if length is None and hasattr(config, "image_size") and hasattr(config, "patch_size"):
        image, patch = (
            (size, size) if isinstance(size, int) else tuple(size) for size in (config.image_size, config.patch_size)
        )
        length = (image[0] // patch[0]) * (image[1] // patch[1])
    if length is None:
        raise ValueError(
            f"Sigmoid attention needs a bias, and {type(config).__name__} has neither `max_position_embeddings` nor "
            "`image_size` and `patch_size` to derive -log(n) from. Set `model.config.sigmoid_bias`, for instance to minus "
            "the logarithm of the sequence length at training."
        )
    return -math.log(length)


def _arguments(module: nn.Module, kwargs: dict) -> dict:
    config = module.config
    bias = getattr(config, "sigmoid_bias", None)
    if "sigmoid_bias" not in type(config).__dataclass_fields__:
        _warn_that_the_choice_is_not_saved(type(config).__name__)
    return {
        "bias": default_sigmoid_bias(config) if bias is None else bias,
        "alibi_slopes": kwargs.pop("alibi_slopes", None),
        "query_offset": kwargs.pop("query_offset", None),
    }


# torch.compile calls it while it traces, instead of breaking the graph
@torch.compiler.assume_constant_result
def _warn_that_the_choice_is_not_saved(config_name: str) -> None:
    logger.warning_once(
        f"{config_name} has no field for sigmoid attention: transformers never saves `attn_implementation`, so a model "
        "saved now is a softmax model when it is loaded again, unless the same `attn_implementation` is passed. To train "
        "with sigmoid attention use a model that stores it, `hf_attn.modeling.sigmoid_attention."
        "SigmoidAttentionForCausalLM`."
    )


SIGMOID = Mechanism(
    name="sigmoid",
    implementations=(
        Implementation("triton", _without_weights(_sigmoid_attention_triton), _supports_triton),
        Implementation("torch", _without_weights(sigmoid_attention_blockwise), supports_blockwise),
        Implementation("eager", sigmoid_attention_eager, _supports_eager),
    ),
    arguments=_arguments,
)
