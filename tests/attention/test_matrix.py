"""Every registered name of every mechanism against its specification: outputs and gradients.

The names are those of `hf_attn.attention.MECHANISMS`, called as transformers' models call them.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_attn.attention import MECHANISMS
from hf_attn.attention.interface import RESULT_CHANGING_ARGUMENTS, Mechanism

from .accuracy import assert_as_exact
from .setups import SETUPS, SelfAttention


@dataclass(frozen=True)
class Call:
    """Shapes and mask of a call; a mask is one of the forms that :func:`make_mask` knows."""

    q_len: int
    kv_len: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    mask: str = "none"
    is_causal: bool = False
    sliding_window: int | None = None


CALLS = {
    "full": Call(33, 33),
    "causal": Call(33, 33, is_causal=True),
    "grouped_heads": Call(17, 17, heads=6, kv_heads=2, is_causal=True),
    "one_kv_head": Call(16, 16, heads=4, kv_heads=1),
    "odd_lengths": Call(7, 131, kv_heads=2),
    "long": Call(150, 150, heads=2, kv_heads=1, is_causal=True),
    "decoding": Call(1, 40, kv_heads=2, is_causal=True),
    "decoding_padded": Call(1, 40, kv_heads=2, mask="padding"),
    "more_queries_than_keys": Call(29, 5),
    "single_token": Call(1, 1, is_causal=True),
    "padding": Call(19, 19, mask="padding"),
    "causal_padding": Call(19, 19, kv_heads=2, mask="causal_padding"),
    "cache_and_mask": Call(5, 23, kv_heads=2, mask="causal_padding"),
    "masked_rows": Call(12, 12, mask="masked_rows"),
    "nothing_allowed": Call(6, 9, mask="nothing_allowed"),
    "additive_minimum": Call(19, 19, kv_heads=2, mask="additive_minimum"),
    "additive_minus_infinity": Call(19, 19, mask="additive_minus_infinity"),
    "additive_bias": Call(11, 13, mask="additive_bias"),
    "mask_of_one_head": Call(9, 9, mask="one_head"),
    "window": Call(37, 37, is_causal=True, sliding_window=5),
    "window_both_sides": Call(37, 37, kv_heads=2, sliding_window=4),
    "unused_static_slots": Call(9, 30, kv_heads=2, is_causal=True),
    "wide_heads": Call(10, 10, heads=2, kv_heads=2, head_dim=72, is_causal=True),
}


def make_mask(call: Call, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask for two rows of a batch, the second of which has padding at its beginning."""
    q_len, kv_len = call.q_len, call.kv_len
    keys = torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
    keys[1, ..., : kv_len // 3] = False
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    generator = torch.Generator().manual_seed(3)
    if call.mask == "none":
        return None
    if call.mask == "padding":
        return keys
    if call.mask == "causal_padding":
        return keys & causal
    if call.mask == "masked_rows":
        allowed = torch.rand(2, 1, q_len, kv_len, generator=generator) < 0.7
        allowed[:, :, ::3] = False
        return allowed
    if call.mask == "nothing_allowed":
        return torch.zeros(2, 1, q_len, kv_len, dtype=torch.bool)
    if call.mask == "one_head":
        return torch.rand(2, call.heads, q_len, kv_len, generator=generator) < 0.6
    if call.mask == "additive_minimum":
        return torch.zeros(2, 1, q_len, kv_len, dtype=dtype).masked_fill(~(keys & causal), torch.finfo(dtype).min)
    if call.mask == "additive_minus_infinity":
        return torch.zeros(2, 1, q_len, kv_len, dtype=dtype).masked_fill(~(keys & causal), float("-inf"))
    if call.mask == "additive_bias":
        bias = torch.randn(1, call.heads, q_len, kv_len, generator=generator).to(dtype)
        return bias.masked_fill(~keys, torch.finfo(dtype).min)
    raise ValueError(call.mask)


def run(
    mechanism: Mechanism, name: str, call: Call, option: str, dtype: torch.dtype, precision: torch.dtype
) -> dict[str, torch.Tensor]:
    """Output and gradients of query, key and value: inputs are rounded to `dtype`, computed in `precision`."""
    setup = SETUPS[mechanism.name]
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(2, heads, length, call.head_dim, generator=generator).to(dtype).to(precision)

    query = draw(call.heads, call.q_len).requires_grad_()
    key, value = (draw(call.kv_heads, call.kv_len).requires_grad_() for _ in range(2))
    upstream = draw(call.heads, call.q_len).transpose(1, 2)
    mask = make_mask(call, dtype)
    if mask is not None and mask.is_floating_point() and precision != dtype:
        # the minimum of a narrower dtype means masked in that dtype only
        mask = mask.to(precision).masked_fill(mask == torch.finfo(dtype).min, torch.finfo(precision).min)
    output, _ = AttentionInterface._global_mapping[name](
        SelfAttention(setup.config(), call.is_causal),
        query,
        key,
        value,
        mask,
        scaling=0.3,
        sliding_window=call.sliding_window,
        **setup.options[option](call.heads, call.kv_len),
    )
    gradients = torch.autograd.grad(output, (query, key, value), upstream)
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def implementations() -> list:
    return [
        pytest.param(mechanism, name, option, id=f"{name}-{option}")
        for mechanism in MECHANISMS
        for name in mechanism.names
        for option in SETUPS[mechanism.name].options
    ]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)
def test_every_mechanism_has_a_setup(mechanism):
    assert mechanism.name in SETUPS, f"Add {mechanism.name!r} to SETUPS in tests/attention/setups.py."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("mechanism", "name", "option"), implementations())
def test_as_exact_as_the_specification(mechanism, name, option, call, dtype):
    try:
        computed = run(mechanism, name, call, option, dtype, dtype)
    except ValueError as error:
        assert name != mechanism.name, f"the automatic name has to serve every call: {error}"
        assert f"attn_implementation={name!r} cannot serve this call: " in str(error)
        pytest.skip(str(error).split(". Use ")[0])
    eager = f"{mechanism.name}_eager"
    specification = run(mechanism, eager, call, option, dtype, dtype)
    exact = run(mechanism, eager, call, option, dtype, torch.float64)
    for what, tensor in computed.items():
        assert_as_exact(tensor, specification[what], exact[what], what)


@pytest.mark.parametrize(
    ("mechanism", "name"),
    [pytest.param(mechanism, name, id=name) for mechanism in MECHANISMS for name in mechanism.names],
)
class TestContract:
    """What transformers expects of a registered name."""

    def call(self, mechanism, name, **arguments):
        tensor = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
        module = SelfAttention(SETUPS[mechanism.name].config(), is_causal=True)
        return AttentionInterface._global_mapping[name](module, tensor, tensor, tensor, None, **arguments)

    def test_name_has_its_mask_function(self, mechanism, name):
        assert ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name] is mechanism.mask_function

    def test_name_is_not_read_as_something_else(self, mechanism, name):
        """Models look for these words inside a name, and for a repository or a paged cache behind these signs."""
        assert not [word for word in ("flash", "sdpa", "flex_attention", "/", "|", "paged") if word in name]

    @pytest.mark.parametrize("argument", RESULT_CHANGING_ARGUMENTS)
    def test_arguments_that_would_change_the_result_are_refused(self, mechanism, name, argument):
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' does not serve {argument}"):
            self.call(mechanism, name, **{argument: torch.ones(2)})

    def test_the_call_decides_on_causality(self, mechanism, name):
        """`is_causal` of the call goes before that of the module."""
        try:
            causal, full = (self.call(mechanism, name, is_causal=is_causal)[0] for is_causal in (None, False))
        except ValueError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(causal[:, -1], full[:, -1])
        assert not torch.allclose(causal[:, 0], full[:, 0])

    def test_arguments_without_meaning_are_ignored(self, mechanism, name):
        try:
            plain = self.call(mechanism, name)[0]
        except ValueError as error:
            pytest.skip(str(error))
        more = self.call(mechanism, name, position_ids=torch.arange(5), use_cache=True, softcap=None)[0]
        torch.testing.assert_close(more, plain, rtol=0, atol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.name)
def test_weights_are_returned_when_asked_for(mechanism):
    """Also by the automatic name, whichever implementation it would take otherwise; with GQA the heads are the query's."""
    module = SelfAttention(SETUPS[mechanism.name].config(), is_causal=True)
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    for name in (mechanism.name, f"{mechanism.name}_eager"):
        output, weights = AttentionInterface._global_mapping[name](
            module, query, key, key, None, output_attentions=True
        )
        assert weights.shape == (2, 4, 6, 6)
        assert not weights.triu(1).any()
        torch.testing.assert_close(output, (weights @ key.repeat_interleave(2, 1)).transpose(1, 2))
