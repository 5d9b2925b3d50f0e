"""The Triton kernels as `hf-attn check-gpu` runs them, a few cases under triton's interpreter; run by `test_gpu_check.py`."""

import torch

from hf_attn.attention import LANDMARK, SIGMOID
from hf_attn.attention.conformance import cases
from hf_attn.attention.gpu_check import check_kernels, record_of


def test_the_kernels_pass_in_the_dtypes_that_the_interpreter_has():
    def few(function):
        return [case for case in cases(function) if case.name.startswith(("grouped_heads", "causal_padding"))]

    results = check_kernels(torch.device("cpu"), 600, (SIGMOID, LANDMARK), few)
    assert record_of(results) == {
        "sigmoid_triton": ["float32", "float16"],
        "landmark_triton": ["float32", "float16"],
    }, [result.faults for result in results]
