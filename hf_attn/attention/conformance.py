"""Every implementation of an attention function against its specification: outputs and gradients.

The tests run these cases on the CPU, `hf-attn check-gpu` runs them on a GPU. Every registered mechanism is included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..kernels.call import AttentionCall, Refusal
from .clear import CLEAR, ClearCall
from .disentangled import DISENTANGLED, DisentangledCall
from .dispatch import AttentionFunction, Implementation
from .interface import Mechanism
from .window import WINDOW, WindowCall


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """Shapes and mask of a call; see [`make_mask`] for the kinds of masks."""

    q_len: int
    kv_len: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    mask: str = "none"
    is_causal: bool = False
    sliding_window: int | None = None


SHAPES = {
    "full": Shape(33, 33),
    "causal": Shape(33, 33, is_causal=True),
    "grouped_heads": Shape(17, 17, heads=6, kv_heads=2, is_causal=True),
    "one_kv_head": Shape(16, 16, heads=4, kv_heads=1),
    "odd_lengths": Shape(7, 131, kv_heads=2),
    "long": Shape(150, 150, heads=2, kv_heads=1, is_causal=True),
    "decoding": Shape(1, 40, kv_heads=2),
    "decoding_padded": Shape(1, 40, kv_heads=2, mask="padding"),
    "more_queries_than_keys": Shape(29, 5),
    "single_token": Shape(1, 1),
    "padding": Shape(19, 19, mask="padding"),
    "causal_padding": Shape(19, 19, kv_heads=2, mask="causal_padding"),
    "cache_and_mask": Shape(5, 23, kv_heads=2, mask="causal_padding"),
    "masked_rows": Shape(12, 12, mask="masked_rows"),
    "nothing_allowed": Shape(6, 9, mask="nothing_allowed"),
    "additive_minimum": Shape(19, 19, kv_heads=2, mask="additive_minimum"),
    "additive_minus_infinity": Shape(19, 19, mask="additive_minus_infinity"),
    "additive_bias": Shape(11, 13, mask="additive_bias"),
    "mask_of_one_head": Shape(9, 9, mask="one_head"),
    "window": Shape(37, 37, is_causal=True, sliding_window=5),
    "window_both_sides": Shape(37, 37, kv_heads=2, sliding_window=4),
    "wide_heads": Shape(10, 10, heads=2, kv_heads=2, head_dim=72, is_causal=True),
}


@dataclass(frozen=True)
class Case:
    """One call in one dtype.

    Attributes:
        name: of the case.
        dtype: that the inputs are rounded to.
        make: `(precision) -> call`; the same numbers in another dtype.
    """

    name: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], AttentionCall]


def cases(function: AttentionFunction) -> Iterator[Case]:
    """The cases of an attention function, each in one dtype."""
    if function is CLEAR:
        yield from _clear_cases()
    elif function is WINDOW:
        yield from _window_cases()
    elif function is DISENTANGLED:
        yield from _disentangled_cases()
    else:
        yield from _mechanism_cases(function)


def _mechanism_cases(mechanism: Mechanism) -> Iterator[Case]:
    """Each shape in each dtype and with each example of the mechanism's own arguments, and each of these with each dtype.

    Pairs, not the full product: a kernel branches on a mask together with an argument of the mechanism, while the dtype
    changes nothing but roundings and the size of tiles.
    """
    examples = list(mechanism.examples.items())
    for i, (name, shape) in enumerate(SHAPES.items()):
        for j in range(max(len(DTYPES), len(examples))):
            dtype = DTYPES[j % len(DTYPES)]
            example, fields = examples[(i + j) % len(examples)]
            make = partial(_mechanism_call, mechanism, shape, fields, dtype)
            yield Case(f"{name}-{example}", dtype, make)


def _mechanism_call(mechanism, shape: Shape, fields, dtype: torch.dtype, precision: torch.dtype) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(2, heads, length, shape.head_dim, generator=generator).to(dtype).to(precision)

    query, key, value = (
        draw(shape.heads, shape.q_len),
        draw(shape.kv_heads, shape.kv_len),
        draw(shape.kv_heads, shape.kv_len),
    )
    mask = make_mask(shape, dtype)
    if mask is not None and mask.is_floating_point() and precision != dtype:
        # the minimum of a narrower dtype means masked in that dtype only
        mask = mask.to(precision).masked_fill(mask == torch.finfo(dtype).min, torch.finfo(precision).min)
    return mechanism.call(
        query,
        key,
        value,
        scaling=0.3,
        attention_mask=mask,
        is_causal=shape.is_causal,
        sliding_window=shape.sliding_window,
        **fields(shape.heads, shape.kv_len),
    )


def make_mask(shape: Shape, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask for two rows of a batch, the second of which has padding at its beginning."""
    q_len, kv_len = shape.q_len, shape.kv_len
    keys = torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
    keys[1, ..., : kv_len // 3] = False
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    generator = torch.Generator().manual_seed(3)
    if shape.mask == "none":
        return None
    if shape.mask == "padding":
        return keys
    if shape.mask == "causal_padding":
        return keys & causal
    if shape.mask == "masked_rows":
        allowed = torch.rand(2, 1, q_len, kv_len, generator=generator) < 0.7
        allowed[:, :, ::3] = False
        return allowed
    if shape.mask == "nothing_allowed":
        return torch.zeros(2, 1, q_len, kv_len, dtype=torch.bool)
    if shape.mask == "one_head":
        return torch.rand(2, shape.heads, q_len, kv_len, generator=generator) < 0.6
    if shape.mask == "additive_minimum":
        return torch.zeros(2, 1, q_len, kv_len, dtype=dtype).masked_fill(~(keys & causal), torch.finfo(dtype).min)
    if shape.mask == "additive_minus_infinity":
        return torch.zeros(2, 1, q_len, kv_len, dtype=dtype).masked_fill(~(keys & causal), float("-inf"))
    if shape.mask == "additive_bias":
        bias = torch.randn(1, shape.heads, q_len, kv_len, generator=generator).to(dtype)
        return bias.masked_fill(~keys, torch.finfo(dtype).min)
    raise ValueError(f"There is no mask {shape.mask!r}.")


#: height, width, text length, radius, down factor
CLEAR_SHAPES = {
    "tiles_divide_nothing": (20, 13, 5, 3, 1),
    "pooled": (12, 16, 6, 4, 4),
    "text_fills_blocks": (8, 16, 130, 3, 2),
    "no_text": (9, 30, 0, 9, 1),
}


def _clear_cases() -> Iterator[Case]:
    for name, shape in CLEAR_SHAPES.items():
        for dtype in DTYPES:
            yield Case(name, dtype, partial(_clear_call, shape, dtype))


def _clear_call(shape: tuple[int, ...], dtype: torch.dtype, precision: torch.dtype) -> ClearCall:
    height, width, text_length, radius, down_factor = shape
    generator = torch.Generator().manual_seed(0)
    size = (2, 3, text_length + height * width, 16)
    states = [torch.randn(size, generator=generator).to(dtype).to(precision) for _ in range(3)]
    weight = None
    if down_factor > 1:
        weight = torch.rand(1, 1, 1, down_factor, 1, down_factor, 1, generator=generator) / down_factor**2
        weight = weight.to(dtype).to(precision)
    return ClearCall(*states, grid=(height, width), radius=radius, spatial_weight=weight, scaling=0.7)


def _window_cases() -> Iterator[Case]:
    for name, masked in (("inside", False), ("at_the_seam", True)):
        for dtype in DTYPES:
            yield Case(name, dtype, partial(_window_call, masked, dtype))


def _window_call(masked: bool, dtype: torch.dtype, precision: torch.dtype) -> WindowCall:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(6, 3, 64, 16, generator=generator).to(dtype).to(precision) for _ in range(3)]
    bias = torch.randn(1, 3, 64, 64, generator=generator).to(dtype).to(precision)
    mask = None
    if masked:
        mask = torch.zeros(1, 1, 64, 64, dtype=precision)
        mask[..., :24, 24:] = mask[..., 24:, :24] = -100.0
    return WindowCall(*states, position_bias=bias, module=torch.nn.Module(), attention_mask=mask, scaling=0.3)


#: text -> length, rows of the table, whether there is padding
DISENTANGLED_SHAPES = {"short": (40, 79, False), "padding": (150, 64, True)}


def _disentangled_cases() -> Iterator[Case]:
    for name, shape in DISENTANGLED_SHAPES.items():
        for dtype in DTYPES:
            yield Case(name, dtype, partial(_disentangled_call, *shape, dtype))


def _disentangled_call(
    length: int, rows: int, padding: bool, dtype: torch.dtype, precision: torch.dtype
) -> DisentangledCall:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, length, 32, generator=generator).to(dtype).to(precision) for _ in range(3)]
    tables = [torch.randn(3, rows, 32, generator=generator).to(dtype).to(precision) for _ in range(2)]
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., length // 2 :] = False
    return DisentangledCall(
        *states,
        position_key=tables[0],
        position_query=tables[1],
        rows=(torch.arange(2 * length - 1) - length + 1 + rows // 2).clamp(0, rows - 1),
        attention_mask=mask if padding else None,
        scaling=0.1,
    )


def on_device(call: AttentionCall, device: torch.device) -> AttentionCall:
    """The call with its tensors on a device."""
    moved = {name: field.to(device) for name, field in vars(call).items() if isinstance(field, torch.Tensor)}
    return type(call)(**{**vars(call), **moved})


def output_and_gradients(implementation: Implementation, call: AttentionCall) -> dict[str, torch.Tensor] | Refusal:
    """Output and the gradients of query, key and value for a fixed gradient of the output; or why there are none."""
    call.query, call.key, call.value = leaves = tuple(
        tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)
    )
    found = implementation.check(call)
    if isinstance(found, Refusal):
        return found
    output, _ = implementation.compute(call, found)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    gradients = torch.autograd.grad(output, leaves, upstream)
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def compare(
    function: AttentionFunction, implementation: Implementation, case: Case, device: torch.device | str = "cpu"
) -> str | Refusal:
    """Run a case by an implementation and by the specification, which is the last implementation of the function.

    Where one call of PyTorch's own softmax attention computes the function, the implementation may also be as inexact as
    that is: its exponentials are approximations.

    Returns:
        A description of the errors that are too large, empty if there are none; or the refusal of the implementation.
    """
    device = torch.device(device)
    eager = function.implementations[-1]
    yardsticks = [i for i in function.implementations if i is eager or i.name in function.yardsticks]
    computed = output_and_gradients(implementation, on_device(case.make(case.dtype), device))
    if isinstance(computed, Refusal):
        return computed
    specifications = [output_and_gradients(i, on_device(case.make(case.dtype), device)) for i in yardsticks]
    exact = output_and_gradients(eager, on_device(case.make(torch.float64), device))
    reports = (inexact(computed[what], [s[what] for s in specifications], exact[what], what) for what in computed)
    return "; ".join(filter(None, reports))


def inexact(computed: torch.Tensor, specifications: list[torch.Tensor], exact: torch.Tensor, what: str = "") -> str:
    """How far an implementation exceeds its error: at most twice that of the specification in the same dtype, and one
    rounding.

    The error is that of the tensor as a whole, its root mean square: the largest of few entries is a matter of luck. An
    error in one place still shows, since no entry may be further off than four times the specification's worst.

    Args:
        computed: result of the implementation.
        specifications: what the eager path computes from the same inputs in the same dtype, and what else may set the
            error.
        exact: the eager path in float64, from the same inputs.
        what: name for the message.

    Returns:
        A message, empty if the implementation is exact enough.
    """
    dtype = specifications[0].dtype
    if computed.dtype != dtype:
        return f"{what}: {computed.dtype} instead of {dtype}"
    if computed.shape != exact.shape:
        return f"{what}: shape {tuple(computed.shape)} instead of {tuple(exact.shape)}"
    unit = torch.finfo(dtype).eps / 2
    ours, *theirs = (tensor.double() - exact for tensor in (computed, *specifications))
    for factor, norm, name in ((2, _root_mean_square, "error"), (4, _largest, "largest error")):
        error, allowed = norm(ours), factor * max(map(norm, theirs)) + unit * norm(exact)
        # not `error > allowed`, which NaN is not
        if not error <= allowed:
            return f"{what}: {name} {error:.3g} where {allowed:.3g} is allowed (values: {norm(exact):.3g})"
    return ""


def _root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()
