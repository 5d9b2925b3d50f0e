"""Patterns that choose layers."""

import pytest
from torch import nn

from hf_attn.patching.patterns import NameFilter, as_patterns
from hf_attn.patching.sigma_reparam import apply_sigma_reparam


def test_a_text_is_one_pattern():
    assert as_patterns("head*") == ("head*",)
    assert as_patterns(pattern for pattern in ("a", "b")) == ("a", "b")
    names = NameFilter("body.*", exclude="body.0.*")
    assert [names.reason_to_skip(name) for name in ("head", "body.0.a", "body.1.a")] == [
        "not included",
        "excluded",
        None,
    ]


def test_sigma_reparam_takes_one_pattern():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    report = apply_sigma_reparam(model, exclude="head")
    assert report.converted == ("body",) and report.skipped == {"head": "excluded"}


@pytest.mark.parametrize("patterns", [[1], (None,)])
def test_patterns_are_texts(patterns):
    with pytest.raises(TypeError, match=r"A pattern must be a string such as 'encoder\.\*', got"):
        as_patterns(patterns)
