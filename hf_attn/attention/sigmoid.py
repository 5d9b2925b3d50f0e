"""Sigmoid attention (arXiv 2409.04431): an element-wise sigmoid in the place of the softmax.

    P_ij = sigmoid(scaling * q_i . k_j - slope * |i - j| + b)  for allowed pairs, exactly 0 for masked ones;  O = P V

Nothing is normalised: rows of P do not sum to one, and a query that may see no key gets zeros. The bias `b` is a
constant of training, `-log(n)` for training sequences of length `n`; it depends neither on the length at hand, nor
on padding, nor on the step of decoding.
"""

import math

import torch
from torch import nn
from transformers.utils import logging

from ..kernels.sigmoid.blockwise import sigmoid_attention_blockwise
from ..kernels.sigmoid.call import SigmoidCall, check_blockwise, check_triton
from .dispatch import Implementation
from .interface import Mechanism


logger = logging.get_logger(__name__)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes of ALiBi, one for each head: geometric with ratio `2 ** (-8 / num_heads)`.

    If `num_heads` is not a power of two, the slopes of the lower power of two are followed by every second one of twice
    that power.

    Returns:
        float32 tensor of shape `(num_heads,)`.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(power) + geometric(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def sigmoid_weights(logits: torch.Tensor, normalization: str | None = None) -> torch.Tensor:
    """Attention weights from final logits (scaled, masked and biased).

    Args:
        logits: `(..., q_len, kv_len)`.
        normalization: `None`; `"row"` divides row `i` (counted from 1) by `i`, its number of causal keys;
            `"sqrt_row"` by `sqrt(i)`. The two alternatives are for causal attention without a cache, where
            `q_len == kv_len`.

    Returns:
        Weights of the same shape.

    Raises:
        ValueError: for another `normalization`, or if the logits are not square where they have to be.
    """
    if torch.compiler.is_exporting():
        # The Sigmoid of onnxruntime is absolutely exact only: half a percent off at -12, zero below -18. A bias of -log(n)
        # makes most weights that small.
        weights = logits.clamp(max=0).exp() / (1 + logits.abs().neg().exp())
    else:
        weights = torch.sigmoid(logits)
    if normalization is None:
        return weights
    if normalization not in ("row", "sqrt_row"):
        raise ValueError(f"normalization must be None, 'row' or 'sqrt_row', got {normalization!r}.")
    q_len, kv_len = logits.shape[-2:]
    if q_len != kv_len:
        raise ValueError(
            f"normalization={normalization!r} counts the causal keys of each row and needs the same number of queries "
            f"and keys, got {q_len} queries and {kv_len} keys."
        )
    count = torch.arange(1, q_len + 1, dtype=weights.dtype, device=weights.device)[:, None]
    return weights / (count if normalization == "row" else count.sqrt())


def sigmoid_attention_eager(call: SigmoidCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid attention as the equation reads; the specification of the other implementations.

    Returns:
        Output `(batch, heads, q_len, value_dim)` and weights `(batch, heads, q_len, kv_len)`, both in the dtype of
        the query. Logits and sigmoid are computed in float32 (or in float64 for float64 input).
    """
    query, mask, bias = call.query, call.attention_mask, call.bias
    key, value = call.repeated_heads()
    precision = torch.promote_types(query.dtype, torch.float32)
    logits = (query @ key.transpose(-1, -2)).to(precision) * call.scaling

    q_len, kv_len = logits.shape[-2:]
    q_position = torch.arange(q_len, device=query.device)[:, None] + call.query_offset
    distance = q_position - torch.arange(kv_len, device=query.device)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if call.is_causal:
        allowed = distance >= 0
    if call.sliding_window is not None:
        allowed = allowed & (distance.abs() < call.sliding_window)
    if call.alibi_slopes is not None:
        logits = logits - call.alibi_slopes.to(precision)[..., None, None] * distance.abs()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask > torch.finfo(mask.dtype).min / 2)
        logits = logits + mask

    if isinstance(bias, torch.Tensor):
        bias = bias.to(precision)[..., None, None]
    weights = sigmoid_weights(logits + bias).masked_fill(~allowed, 0.0).to(query.dtype)
    output = nn.functional.dropout(weights, p=call.dropout) @ value
    return output, weights


def _eager(call: SigmoidCall, found: None):
    return sigmoid_attention_eager(call)


def _torch(call: SigmoidCall, found: None):
    return sigmoid_attention_blockwise(call), None


def _triton(call: SigmoidCall, found: None):
    from ..kernels.sigmoid.triton import sigmoid_attention_triton

    return sigmoid_attention_triton(call), None


def default_sigmoid_bias(config) -> float:
    """The bias that the paper recommends, `-log(n)` for the longest sequence `n` that a model is trained on.

    Args:
        config: configuration of any transformers model. `n` is its `max_position_embeddings` or, for images, the
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
        f"{config_name} has no field for sigmoid attention. transformers does not save `attn_implementation`, so a "
        "model that is saved now computes softmax attention when it is loaded again, unless the same "
        "`attn_implementation` is passed. To train with sigmoid attention, use a model that stores it: "
        "`hf_attn.modeling.sigmoid_attention.SigmoidAttentionForCausalLM`."
    )


SIGMOID = Mechanism(
    name="sigmoid",
    implementations=(
        Implementation("triton", _triton, check_triton, gpu_kernel=True),
        Implementation("torch", _torch, check_blockwise),
        Implementation("eager", _eager),
    ),
    call=SigmoidCall,
    arguments=_arguments,
    examples={
        "plain": lambda heads, kv_len: {"bias": -1.5},
        "alibi": lambda heads, kv_len: {"bias": -1.5, "alibi_slopes": torch.linspace(0.1, 0.6, heads)},
    },
)
