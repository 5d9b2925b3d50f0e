"""The Triton kernels of sigmoid attention under triton's interpreter; run by `test_sigmoid_triton.py` in a process of its own."""

import pytest
import torch

from hf_attn.kernels.sigmoid import triton as sigmoid
from hf_attn.kernels.sigmoid.call import SigmoidCall, check_triton
from hf_attn.kernels.sigmoid.triton import sigmoid_attention_triton

from .sigmoid_cases import CASES, Case, assert_equals_eager, assert_within_low_precision_budget


# The interpreter runs one block at a time, so fewer and larger tiles than on a GPU make it fast enough.
TILES = {kernel: dict.fromkeys((128, 256, 512, 1024), (32, 16, 4)) for kernel in sigmoid.KERNELS}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sigmoid, "TILES", TILES)


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name):
    assert_equals_eager(sigmoid_attention_triton, CASES[name])


@pytest.mark.parametrize("name", ["causal", "additive", "boolean_causal_alibi"])
def test_low_precision_budget(name):
    """In float16, because triton's interpreter multiplies bit patterns of bfloat16 as integers."""
    assert_within_low_precision_budget(sigmoid_attention_triton, CASES[name], torch.float16)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shipped_tiles(head_dim, monkeypatch):
    monkeypatch.undo()
    case = Case(batch=1, heads=2, kv_heads=1, q_len=70, kv_len=70, head_dim=head_dim, value_dim=head_dim)
    assert_equals_eager(sigmoid_attention_triton, case)


def test_a_query_without_keys_gets_exact_zeros():
    query, key, value = Case(batch=1).inputs()
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool)
    mask[:, :, 20] = False
    call = SigmoidCall(100 * query, key, value, scaling=10.0, bias=50.0, attention_mask=mask)
    output = sigmoid_attention_triton(call)
    assert (output[:, :, 20] == 0).all()
    assert not (output[:, :, 19] == 0).any()


def test_empty_tensors():
    assert sigmoid_attention_triton(SigmoidCall(*Case(q_len=0).inputs())).shape == (2, 4, 0, 16)


def test_is_supported_on_the_cpu_here():
    query, key, value = Case().inputs()
    assert check_triton(SigmoidCall(query, key, value)) is None
    refusal = check_triton(SigmoidCall(query.bfloat16(), key.bfloat16(), value.bfloat16()))
    assert "bfloat16" in refusal.reason
    refusal = check_triton(SigmoidCall(query.double(), key.double(), value.double()))
    assert "float64" in refusal.reason
    wide = torch.zeros(1, 1, 1, 300)
    assert "300" in check_triton(SigmoidCall(wide, wide, wide)).reason
