"""A miniature of each claim, and the stored results, whose conclusions follow from their measurements."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hf_attn.catalog import PAPERS
from hf_attn.claims import runs
from hf_attn.claims.result import figures_of, read_result
from hf_attn.claims.run import claim_module, claims, run_claim


RESULTS = Path(__file__).parents[2] / "docs" / "results"
STORED = sorted(path.stem for path in RESULTS.glob("*.json"))


def test_runs_are_named_by_papers():
    names = {path.stem for path in Path(runs.__file__).parent.glob("*.py")} - {"__init__"}
    assert names == set(claims()) and names <= set(PAPERS)


@pytest.mark.parametrize("slug", claims())
def test_miniature(slug, tmp_path, monkeypatch):
    record = run_claim(slug, tmp_path / "run", seeds=(0, 1), miniature=True)
    assert record["figures"] and record["why"] and record["claim"] == PAPERS[slug].claim
    assert json.loads((tmp_path / "run" / f"{slug}.json").read_text()) == record
    with Image.open(tmp_path / "run" / f"{slug}.png") as picture:
        assert picture.width > 100
    # The second run reuses all parts.
    again = run_claim(slug, tmp_path / "run", seeds=(0, 1), miniature=True)
    assert again == record


@pytest.mark.parametrize("slug", STORED)
def test_what_is_stored_follows_from_what_was_measured(slug):
    record = read_result(RESULTS, slug)
    conclusion = claim_module(slug).conclude(record["data"])
    assert (conclusion.verdict, conclusion.why, conclusion.figures) == (
        record["verdict"],
        record["why"],
        figures_of(record),
    )
    assert record["claim"] == PAPERS[slug].claim, f"run `hf-attn claim {slug} --store` again: the claim has changed"
    assert (RESULTS / f"{slug}.png").stat().st_size < 80_000
