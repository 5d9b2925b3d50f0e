"""The Triton kernels of sigmoid attention without a GPU: numerically under the interpreter, and compiled for real targets.

They have not been run on a GPU by these tests.
"""

import pytest
import torch

from hf_attn.kernels.sigmoid.call import SigmoidCall, check_triton

from .processes import ROOT, run, run_interpreted


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


def test_under_the_interpreter():
    output = run_interpreted("tests/kernels/interpreted_sigmoid_triton.py")
    assert "passed" in output and "skipped" not in output


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "mask", "has_alibi"), [(64, "bf16", "none", False), (128, "fp16", "boolean", True)]
)
def test_compiles_ahead_of_time(target, head_dim, dtype, mask, has_alibi, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    import triton_aot as aot

    for kernel in ("forward", "grad_query", "grad_key_value"):
        compiled = aot.compile_kernel("sigmoid", kernel, target, head_dim, dtype, mask, has_alibi=has_alibi)
        assert 0 < compiled.metadata.shared <= aot.SHARED_MEMORY[target]
        assert ("cubin" if target.startswith("sm") else "hsaco") in compiled.asm


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key_value"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(256, "bf16"), (16, "fp16")])
def test_extreme_head_dims_fit(kernel, head_dim, dtype, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    import triton_aot as aot

    # Limit per block on sm_86 and sm_89: 99 KiB.
    assert aot.compile_kernel("sigmoid", kernel, "sm_80", head_dim, dtype).metadata.shared <= 99 * 1024


def test_reasons():
    query = torch.zeros(1, 1, 2, 16)
    reason = check_triton(SigmoidCall(query, query, query)).reason
    assert "GPU" in reason and "'cpu'" in reason
    assert "dropout" in check_triton(SigmoidCall(query, query, query, dropout=0.5)).reason


def test_checking_needs_no_triton():
    code = "import sys; import hf_attn.kernels.sigmoid.call; assert 'triton.language' not in sys.modules"
    assert run("-c", code).returncode == 0
