"""The signed-rank test between systems and Holm's correction, against values calculated by hand."""

import pytest

from hf_attn.analysis.paired_tests import holm, paired_tests


pytest.importorskip("scipy")


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_pairs_of_systems():
    scores = {"a": [6, 7, 8, 9, 10, 11], "b": [5, 5, 5, 5, 5, 5], "c": [5, 5, 5, 5, 5, 5]}
    a_b, a_c, b_c = paired_tests(scores)
    # All six differences have the same sign: 2 of the 2**6 equally likely sign patterns are as extreme.
    assert (a_b.first, a_b.second, a_b.difference) == ("a", "b", 3.5)
    assert a_b.p == pytest.approx(2 / 2**6)
    assert a_b.holm_p == a_c.holm_p == pytest.approx(3 * 2 / 2**6)
    assert (b_c.p, b_c.holm_p) == (1.0, 1.0)
    with pytest.raises(ValueError, match="same tasks, at least two"):
        paired_tests({"a": [1.0], "b": [2.0]})
