"""The Triton kernels of landmark attention without a GPU: numerically under the interpreter, and compiled for real targets.

They have not been run on a GPU by these tests.
"""

from dataclasses import replace

import pytest

from hf_attn.kernels.landmark.call import check_triton

from .processes import ROOT, run_interpreted
from .test_landmark_blockwise import make_call


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


def test_under_the_interpreter():
    output = run_interpreted("tests/kernels/interpreted_landmark_triton.py")
    assert "passed" in output and "skipped" not in output


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
    call = make_call()
    assert "runs on a GPU" in check_triton(call).reason
    assert call.block_size is None, "it has looked for landmarks, which waits for the device, before it had to"
    assert "dropout" in check_triton(replace(call, dropout=0.5)).reason
