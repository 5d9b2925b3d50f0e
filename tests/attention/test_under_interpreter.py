"""The Triton kernels under triton's interpreter in a separate process. It is slow, so models are called only a few times."""

import re

import pytest

from tests.kernels.processes import run_interpreted


pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")


@pytest.mark.slow
def test_the_kernels_conform():
    output = run_interpreted(
        "tests/attention/test_conformance.py", "tests/attention/test_interface.py", "-k", "triton and not refused"
    )
    assert int(re.search(r"(\d+) passed", output)[1]) >= 50, output


@pytest.mark.slow
def test_models_run_on_the_pinned_name():
    output = run_interpreted(
        *("tests/attention/test_sigmoid_on_foreign_models.py", "-k"),
        "sigmoid_triton and (later_tokens or (padding_changes and (llama or bert)))",
    )
    assert int(re.search(r"(\d+) passed", output)[1]) >= 7, output
    assert "skipped" not in output, output
