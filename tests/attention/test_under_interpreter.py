"""The registered names that are pinned to Triton kernels, in a process where triton's interpreter serves them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


@pytest.mark.slow
def test_triton_names_pass_the_same_tests():
    """The matrix in float32, and foreign models: exactness, causality and padding. The interpreter is slow, hence no more."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="),
            *("tests/attention/test_matrix.py", "tests/attention/test_sigmoid_on_foreign_models.py", "-k"),
            "_triton and ((plain and float32) or Contract or later_tokens or (padding_changes and (llama or bert))"
            " or (as_exact_as_the_specification and float32 and not alibi))",
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 40, result.stdout
    assert "skipped" not in result.stdout, result.stdout
