"""The Triton kernels of landmark attention without a GPU: numerically under the interpreter, and compiled for real targets.

They have not been run on a GPU by these tests.
"""

import re

import pytest

from hf_attn.kernels.triton_support import supports_landmark_triton

from .processes import ROOT, run_interpreted
from .test_landmark_blockwise import make_call


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


def test_under_the_interpreter():
    output = run_interpreted("tests/kernels/interpreted_landmark_triton.py")
    assert "passed" in output and "skipped" not in output


@pytest.mark.slow
def test_the_registered_name_passes_the_matrix():
    """Calls that are not causal, or have other masks than boolean ones, are refused and skipped there."""
    selection = "landmark_triton and regular_16 and float32"
    output = run_interpreted("tests/attention/test_matrix.py", "-k", selection)
    assert int(re.search(r"(\d+) passed", output)[1]) >= 9, output


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("head_dim", "dtype", "mask"), [(64, "bf16", "none"), (128, "fp16", "boolean")])
def test_compiles_ahead_of_time(target, head_dim, dtype, mask, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    import triton_aot as aot

    for kernel in ("forward", "grad_query", "grad_key_value"):
        compiled = aot.compile_kernel("landmark", kernel, target, head_dim, dtype, mask, block_size=64)
        assert 0 < compiled.metadata.shared <= aot.SHARED_MEMORY[target]
        assert ("cubin" if target.startswith("sm") else "hsaco") in compiled.asm


def test_reasons_on_the_cpu():
    inputs, arguments = make_call()
    ok, reason = supports_landmark_triton(*inputs, **arguments)
    assert not ok and "and they are 5 (mem_freq=4); train with mem_freq=63" in reason
    inputs, arguments = make_call(block=16)
    ok, reason = supports_landmark_triton(*inputs, **arguments)
    assert not ok and "runs on a GPU" in reason
    ok, reason = supports_landmark_triton(*inputs, **{**arguments, "dropout": 0.5})
    assert not ok and "dropout" in reason
