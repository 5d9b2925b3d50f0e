"""The blockwise path of sigmoid attention against its specification, in many small blocks."""

from dataclasses import replace

import pytest
import torch

from hf_attn.attention.sigmoid import sigmoid_attention_eager
from hf_attn.kernels.sigmoid import blockwise
from hf_attn.kernels.sigmoid.blockwise import sigmoid_attention_blockwise
from hf_attn.kernels.sigmoid.call import SigmoidCall, check_blockwise

from .sigmoid_cases import CASES, Case, assert_equals_eager, assert_within_low_precision_budget


@pytest.fixture(params=["small_blocks", "uncopied_keys", "shipped_blocks"])
def blocks(request, monkeypatch):
    if request.param != "shipped_blocks":
        monkeypatch.setattr(blockwise, "BLOCK_ROWS", 16)
        monkeypatch.setattr(blockwise, "BLOCK_ROWS_AT_EDGES_IF_SHORT", 8)
        monkeypatch.setattr(blockwise, "BLOCK_COLUMNS", 24)
        monkeypatch.setattr(blockwise, "FEW_ROWS", 0 if request.param == "small_blocks" else 10**6)


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name, blocks):
    assert_equals_eager(sigmoid_attention_blockwise, CASES[name])


@pytest.mark.parametrize("name", ["causal", "window", "cache"])
def test_blocks_of_long_sequences(name, monkeypatch):
    monkeypatch.setattr(blockwise, "SHORT", 8)
    monkeypatch.setattr(blockwise, "BLOCK_ROWS_AT_EDGES", 16)
    monkeypatch.setattr(blockwise, "BLOCK_COLUMNS", 24)
    monkeypatch.setattr(blockwise, "FEW_ROWS", 0)
    monkeypatch.setattr(blockwise, "WEIGHTS_IN_CACHE", 1)
    assert_equals_eager(sigmoid_attention_blockwise, CASES[name])


@pytest.mark.parametrize("name", ["causal", "decode_padding", "additive", "alibi", "boolean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_budget(name, dtype, blocks):
    assert_within_low_precision_budget(sigmoid_attention_blockwise, CASES[name], dtype)


def test_gradients_in_float64(blocks):
    case = Case(batch=1, q_len=9, kv_len=27, head_dim=3, value_dim=2, mask="padding", arguments={"is_causal": True})
    keywords = case.keywords()
    assert torch.autograd.gradcheck(
        lambda *inputs: sigmoid_attention_blockwise(SigmoidCall(*inputs, **keywords)), case.inputs(torch.float64)
    )


@pytest.mark.parametrize("kind", ["boolean", "additive", "padding"])
def test_a_query_without_keys_gets_exact_zeros(kind, blocks):
    query, key, value = Case(batch=1).inputs()
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool)
    mask[:, :, 20] = False
    if kind == "padding":
        mask = torch.zeros(1, 1, 1, 37, dtype=torch.bool)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    call = SigmoidCall(100 * query, key, value, scaling=10.0, bias=50.0, attention_mask=mask)
    output = sigmoid_attention_blockwise(call)
    assert (output[:, :, 20] == 0).all()
    assert (output[:, :, 19] == 0).all() == (kind == "padding")


def test_a_masked_key_changes_no_bit(blocks):
    query, key, value = Case(batch=1, kv_len=48).inputs()
    mask = torch.ones(1, 1, 1, 48, dtype=torch.bool)
    mask[..., 30:] = False
    before = sigmoid_attention_blockwise(SigmoidCall(query, key, value, attention_mask=mask))
    key, value = key.detach().clone(), value.detach().clone()
    key[:, :, 30:], value[:, :, 30:] = 7.0, -3.0
    assert torch.equal(before, sigmoid_attention_blockwise(SigmoidCall(query, key, value, attention_mask=mask)))


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 0, 3), (1, 3, 0)])
def test_empty_tensors(shape):
    batch, q_len, kv_len = shape
    case = Case(batch=batch, q_len=q_len, kv_len=kv_len)
    assert_equals_eager(sigmoid_attention_blockwise, case)


@pytest.mark.parametrize("name", ["causal", "padding"])
def test_layout_of_models(name, blocks):
    """Query, key and value as views of (batch, length, heads, head_dim), as after projections."""

    def transposed(call):
        inputs = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key, call.value))
        output = sigmoid_attention_blockwise(
            replace(call, **dict(zip(("query", "key", "value"), inputs, strict=True)))
        )
        assert output.transpose(1, 2).is_contiguous()
        return output

    assert_equals_eager(transposed, CASES[name])


def test_op_is_well_formed():
    """Schema, fake implementation and autograd registration, as torch.compile relies on them."""
    case = CASES["boolean_causal_alibi"]
    query, key, value = case.inputs()
    keywords = case.keywords()
    torch.library.opcheck(
        torch.ops.hf_attn.sigmoid_attention_blockwise.default,
        (query, key, value, keywords["attention_mask"], None, keywords["alibi_slopes"], 0.25, -2.0, True, None, 0),
    )


def test_compiles_without_graph_break():
    case = CASES["causal"]
    keywords = case.keywords()
    compiled = torch.compile(
        lambda *inputs: sigmoid_attention_blockwise(SigmoidCall(*inputs, **keywords)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_equals_eager(lambda call: compiled(call.query, call.key, call.value), case)


def test_memory_does_not_hold_the_weights():
    """At 16 heads and 4096 tokens the weights alone would be 1 GiB; the largest allocation is one block of them."""
    query, key, value = (torch.randn(1, 16, 4096, 8, requires_grad=True) for _ in range(3))

    with torch.profiler.profile(profile_memory=True) as profile:
        call = SigmoidCall(query, key, value, scaling=0.1, bias=-8.0, is_causal=True)
        sigmoid_attention_blockwise(call).sum().backward()
    allocations = [event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty")]
    assert 0 < max(allocations) <= 4 * 2**20


def test_reasons():
    query, key, value = Case().inputs()

    def reason(*inputs, **keywords):
        refusal = check_blockwise(SigmoidCall(*inputs, **keywords))
        return None if refusal is None else refusal.reason

    assert reason(query, key, value) is None
    assert "dropout=0.1" in reason(query, key, value, dropout=0.1)
    assert "weights" in reason(query, key, value, output_weights=True)
    assert "bfloat16" in reason(query.bfloat16(), key, value)
    assert "query_offset" in reason(query, key, value, query_offset=torch.tensor(3))
    assert "bias" in reason(query, key, value, bias=torch.zeros(4, requires_grad=True))
    with torch.no_grad():
        assert reason(query, key, value, bias=torch.zeros(4, requires_grad=True)) is None


def test_the_cases_tell_wrong_from_right():
    """Check of the comparison itself: the reference implementation with another alignment must fail."""
    with pytest.raises(AssertionError):
        assert_equals_eager(
            lambda call: sigmoid_attention_eager(replace(call, query_offset=0)),
            CASES["cache"],
        )
