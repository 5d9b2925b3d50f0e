"""The Triton kernels of landmark attention under triton's interpreter; run by `test_landmark_triton.py` in a process of its own."""

from functools import partial

import pytest
import torch

from hf_attn.attention.landmark import landmark_attention_eager
from hf_attn.kernels.landmark.triton import landmark_attention_triton
from hf_attn.kernels.triton_support import supports_landmark_triton
from tests.attention.accuracy import assert_as_exact

from .test_landmark_blockwise import make_call


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


def results(function, inputs, arguments) -> list[torch.Tensor]:
    output = function(*inputs, **arguments)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def triton_call(*inputs, scaling, attention_mask=None, block_size=16, **others) -> torch.Tensor:
    return landmark_attention_triton(*inputs, scaling=scaling, attention_mask=attention_mask, block_size=block_size)


def eager(*inputs, **arguments) -> torch.Tensor:
    return landmark_attention_eager(*inputs, **arguments)[0]


@pytest.mark.parametrize(
    ("call", "dtype"),
    [*((call, torch.float32) for call in CALLS), *((call, torch.float16) for call in ({}, {"mask": "holes"}))],
    ids=str,
)
def test_as_exact_as_the_specification(call, dtype):
    call = {"q_len": 53, "kv_len": 53, "block": 16, **call}
    inputs, arguments = make_call(**call, dtype=dtype)
    assert supports_landmark_triton(*inputs, **arguments) == (True, "")

    triton = partial(triton_call, block_size=call["block"])
    computed, specification = (results(function, inputs, arguments) for function in (triton, eager))
    exact = results(eager, [tensor.detach().double().requires_grad_() for tensor in inputs], arguments)
    for name, ours, theirs, oracle in zip(
        ("output", "query", "key", "value"), computed, specification, exact, strict=True
    ):
        assert_as_exact(ours, theirs, oracle, name)


def test_a_query_without_keys_gets_zeros_and_gives_no_gradient():
    (query, key, value), _ = make_call(q_len=20, kv_len=20)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[:, :, 17] = False
    output = landmark_attention_triton(query, key, value, scaling=1.0, block_size=16, attention_mask=mask)
    assert (output[:, :, 17] == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert (gradient[:, :, 17] == 0).all() and gradient.isfinite().all()


def test_a_single_key_gives_its_query_no_gradient():
    """Exactly, as in the specification."""
    inputs, arguments = make_call(q_len=1, kv_len=1)
    _, grad_query, grad_key, grad_value = results(triton_call, inputs, arguments)
    assert (grad_query == 0).all() and (grad_key == 0).all() and (grad_value != 0).any()


def test_no_queries():
    (query, key, value), _ = make_call()
    assert landmark_attention_triton(query[:, :, :0], key, value, scaling=1.0, block_size=16).shape == (2, 4, 0, 8)


def test_reasons():
    def reason(**call):
        inputs, arguments = make_call(**call)
        return supports_landmark_triton(*inputs, **arguments)[1]

    assert "and they are 51 (mem_freq=50); train with mem_freq=63" in reason(block=51, q_len=60, kv_len=60)
    assert "and there is no landmark" in reason(block=1000, q_len=200, kv_len=200)
    assert "bfloat16" in reason(block=16, dtype=torch.bfloat16)
    assert "float64" in reason(block=16, dtype=torch.float64)
