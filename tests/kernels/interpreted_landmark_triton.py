"""The Triton kernels of landmark attention under triton's interpreter; run by `test_landmark_triton.py` in a process of its own."""

from dataclasses import replace

import pytest
import torch

from hf_attn.attention.landmark import LANDMARK
from hf_attn.kernels.landmark.call import LandmarkCall, check_triton
from hf_attn.kernels.landmark.triton import landmark_attention_triton
from tests.attention.accuracy import assert_as_exact

from .test_landmark_blockwise import inputs_of, make_call


CALLS = [
    {},
    {"kv_heads": 4},
    {"kv_len": 64, "q_len": 64},
    {"q_len": 7},
    {"q_len": 1},
    {"block": 32},
    {"block": 64, "kv_len": 40, "q_len": 40},
    {"mask": "padding"},
    {"mask": "holes"},
    {"mask": "padding", "q_len": 9},
]


def results(name: str, call: LandmarkCall) -> list[torch.Tensor]:
    output, _ = LANDMARK(call, name)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs_of(call), upstream)]


def in_float64(call: LandmarkCall) -> LandmarkCall:
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs_of(call))
    return replace(call, query=query, key=key, value=value)


@pytest.mark.parametrize(
    ("call", "dtype"),
    [*((call, torch.float32) for call in CALLS), *((call, torch.float16) for call in ({}, {"mask": "holes"}))],
    ids=str,
)
def test_as_exact_as_the_specification(call, dtype):
    call = make_call(**{"q_len": 53, "kv_len": 53, "block": 16, **call}, dtype=dtype)
    computed, specification = (results(name, call) for name in ("landmark_triton", "landmark_eager"))
    exact = results("landmark_eager", in_float64(call))
    for name, ours, theirs, oracle in zip(
        ("output", "query", "key", "value"), computed, specification, exact, strict=True
    ):
        assert_as_exact(ours, theirs, oracle, name)


def test_a_query_without_keys_gets_zeros_and_gives_no_gradient():
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[:, :, 17] = False
    call = replace(make_call(q_len=20, kv_len=20), scaling=1.0, attention_mask=mask)
    output = landmark_attention_triton(call, 16)
    assert (output[:, :, 17] == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), call.query)
    assert (gradient[:, :, 17] == 0).all() and gradient.isfinite().all()


def test_a_single_key_gives_its_query_no_gradient():
    """Exactly, as in the specification."""
    _, grad_query, grad_key, grad_value = results("landmark_triton", make_call(q_len=1, kv_len=1))
    assert (grad_query == 0).all() and (grad_key == 0).all() and (grad_value != 0).any()


def test_no_queries():
    call = make_call()
    assert landmark_attention_triton(replace(call, query=call.query[:, :, :0]), 16).shape == (2, 4, 0, 8)


def test_reasons():
    def reason(**call):
        return check_triton(make_call(**call)).reason

    assert "but they are 51 (mem_freq=50); train with mem_freq=63" in reason(block=51, q_len=60, kv_len=60)
    assert "but there is no landmark" in reason(block=1000, q_len=200, kv_len=200)
    assert "bfloat16" in reason(block=16, dtype=torch.bfloat16)
    assert "float64" in reason(block=16, dtype=torch.float64)
