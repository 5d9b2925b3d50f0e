"""The registered name that is pinned to sigmoid's Triton kernel, in a process where triton's interpreter serves it."""

import re

import pytest

from tests.kernels.processes import run_interpreted


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


@pytest.mark.slow
def test_the_triton_name_passes_the_same_tests():
    """The matrix in float32, and foreign models: exactness, causality and padding. The interpreter is slow, hence no more."""
    output = run_interpreted(
        *("tests/attention/test_matrix.py", "tests/attention/test_sigmoid_on_foreign_models.py", "-k"),
        "sigmoid_triton and ((plain and float32) or Contract or later_tokens or (padding_changes and (llama or bert))"
        " or (as_exact_as_the_specification and float32 and not alibi))",
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 40, output
    assert "skipped" not in output, output
