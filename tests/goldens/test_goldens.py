"""Every case folder beside this file is a test."""

from pathlib import Path

import pytest

from .case import Case, find_cases
from .runner import run_case


@pytest.mark.parametrize("case", find_cases(Path(__file__).parent), ids=lambda case: case.name)
def test_golden(case: Case):
    result = run_case(case)
    assert not result.problems, f"\n{result}"
