"""Every implementation of every attention function against its specification: outputs and gradients.

The automatic names are not included: `test_dispatch.py` tests which implementation they choose.
"""

import os
from itertools import groupby

import pytest
import torch

from hf_attn.attention import MECHANISMS, Refusal
from hf_attn.attention.conformance import CLEAR, WINDOW, cases, compare, inexact


FUNCTIONS = (*MECHANISMS, CLEAR, WINDOW)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cases_here() -> list:
    """The cases of the implementations that this machine can run, those of one shape together."""
    return [
        pytest.param(function, implementation, list(group), id=f"{function.name}_{implementation.name}-{shape}")
        for function in FUNCTIONS
        for implementation in function.implementations[:-1]
        if not implementation.gpu_kernel or (INTERPRETED and implementation.name == "triton")
        for shape, group in groupby(cases(function), key=lambda case: case.name.partition("-")[0])
    ]


@pytest.mark.parametrize(("function", "implementation", "group"), cases_here())
def test_as_exact_as_the_specification(function, implementation, group):
    for case in group:
        report = compare(function, implementation, case)
        if isinstance(report, Refusal):
            assert len(report.reason) > 10
        else:
            assert not report, f"{case.name} in {case.dtype}: {report}"


@pytest.mark.parametrize(
    ("function", "implementation", "at_least"),
    [
        *(
            (function, "torch", at_least)
            for function, at_least in zip(MECHANISMS, (66, 30, 33, 21, 30, 30, 21, 30), strict=True)
        ),
        (CLEAR, "tiles", 12),
        (WINDOW, "sdpa", 6),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_implementation_does_not_refuse_what_it_can_serve(function, implementation, at_least):
    check = next(i.check for i in function.implementations if i.name == implementation)
    assert sum(not isinstance(check(case.make(case.dtype)), Refusal) for case in cases(function)) >= at_least


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_the_cases_pair_everything(function):
    """Each shape with each dtype and with each example, and each example with each dtype."""
    names = [(*case.name.partition("-")[::2], case.dtype) for case in cases(function)]
    assert len(set(names)) == len(names)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        seen = {(name[first], name[second]) for name in names}
        assert len(seen) == len({name[first] for name in names}) * len({name[second] for name in names})


def test_an_error_in_one_place_shows_and_so_does_nan():
    exact = torch.randn(400, dtype=torch.float64)
    specification = exact.float()
    assert inexact(specification, [specification], exact) == ""
    for wrong in (1.0, float("nan")):
        computed = specification.clone()
        computed[3] += wrong
        assert "error" in inexact(computed, [specification], exact, "output")
