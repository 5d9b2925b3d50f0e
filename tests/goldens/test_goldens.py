"""Every case folder beside this file is a test."""

from pathlib import Path

import pytest

from .case import Case, find_cases
from .runner import run_case


#: case -> the array in which it is known to be beyond its tolerance, and why. It is reported as an expected failure
#: where the processor's rounding leaves it there.
BEYOND_TOLERANCE = {
    "landmark/llama_full_forward": (
        "grad_embed_tokens",
        "entries reach 192, where the official float32 result is itself off by 7e-4 against float64; the tolerance is 2e-5 + "
        "1e-4 of the entry. tests/modeling/landmark bounds our gradient against float64",
    ),
}


@pytest.mark.parametrize("case", find_cases(Path(__file__).parent), ids=lambda case: case.name)
def test_golden(case: Case):
    result = run_case(case)
    known, reason = BEYOND_TOLERANCE.get(case.name, (None, ""))
    others = [problem for problem in result.problems if known is None or not problem.startswith(known)]
    assert not others, f"\n{result}"
    if result.problems:
        pytest.xfail(f"{known}: {reason}")
