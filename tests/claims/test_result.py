"""Figures, the rule of the seeds, and the file of a result."""

import json
import re

import pytest

from hf_attn.claims.result import Conclusion, Figure, agreement, figures_of, read_result, write_result


FIGURE = Figure.of("accuracy", "%", [90.0, 92.0, 94.0], "ViT", [80.0, 80.0, 83.0])


def test_a_figure_summarises_its_seeds():
    assert (FIGURE.value, FIGURE.spread, FIGURE.peer_value) == (92.0, 2.0, 81.0)
    assert str(FIGURE) == "accuracy 92 ± 2 % (ViT: 81 ± 1.7 %)"
    assert str(Figure.of("operations", "GFLOP", 2600.4)) == "operations 2,600 GFLOP"


@pytest.mark.parametrize(
    ("values", "peers", "sign"),
    [
        ([3, 4, 5], [1, 2, 2], 1),
        ([1, 2, 2], [3, 4, 5], -1),
        ([3, 4, 1], [1, 2, 2], 0),  # one seed disagrees
        ([11, 1.1, 1.1], [1, 1, 1], 0),  # nearly all of the difference is due to one seed
        ([2], [1], 1),
        ([1, 1, 1], [1, 1, 1], 0),
    ],
)
def test_the_seeds_have_to_agree(values, peers, sign):
    assert agreement(values, peers) == sign


def test_a_verdict_is_one_of_four():
    with pytest.raises(ValueError, match="contradicted here"):
        Conclusion((FIGURE,), "proved", "")


def test_what_is_written_is_read(tmp_path):
    conclusion = Conclusion((FIGURE,), "shown in small", "It is more.")
    written = write_result(tmp_path / "results" / "tnt.json", "tnt", "It is better.", conclusion, date="2026-01-02")
    read = read_result(tmp_path / "results", "tnt")
    assert read == written
    assert figures_of(read) == (FIGURE,)
    assert read["command"] == "hf-attn claim tnt"
    assert re.fullmatch(r"\d+ cores? of [\w-]+ \(\d+ used\), .+", read["machine"])


def test_no_result_and_a_broken_one(tmp_path):
    assert read_result(tmp_path, "tnt") is None
    (tmp_path / "tnt.json").write_text(json.dumps({"slug": "tnt"}))
    with pytest.raises(ValueError, match=r"tnt\.json does not contain a result"):
        read_result(tmp_path, "tnt")
