"""The documentation of the claims, written from the stored results."""

from pathlib import Path
from typing import Any

from ..catalog import PAPERS
from .result import figures_of, read_result
from .run import claims


NOT_RUN = "not run yet"
_HEAD = """\
# What the papers claim, shown in small

One claim for each paper, in our words, and what a run on a small machine makes of it. "Shown" is exact, such as a count;
"shown in small" holds for small models and data, and says nothing about large ones. Every verdict follows from the figures by a
rule that the docstring of the run's module in `hf_attn/claims/runs` states. `hf-attn claim SLUG` repeats a run, and prints its figures beside
these.

| paper | claim | measured here | verdict | run |
|---|---|---|---|---|
"""


def claims_page(results: str | Path) -> str:
    """The page with all claims, from the results in a folder."""
    return _HEAD + "".join(_row(slug, read_result(results, slug)) for slug in PAPERS)


def paper_section(slug: str, results: str | Path, path_to_results: str) -> str:
    """The claim of a paper for its page.

    Args:
        slug: the paper.
        results: folder with the results.
        path_to_results: path from the page to that folder, for the figure.
    """
    record = read_result(results, slug)
    lines = ["## Claim", "", PAPERS[slug].claim, ""]
    if record is None:
        return "\n".join([*lines, f"Verdict: {NOT_RUN}."])
    lines += [f"Verdict: **{record['verdict']}**. {record['why']}", ""]
    lines += [f"- {figure}" for figure in figures_of(record)]
    lines += ["", f"`{record['command']}`: {_circumstances(record)}.", ""]
    return "\n".join([*lines, f"![What was measured of {slug}]({path_to_results}/{slug}.png)"])


def _row(slug: str, record: dict[str, Any] | None) -> str:
    paper = f"[`{slug}`](papers/{slug}.md)"
    if record is None:
        return f"| {paper} | {PAPERS[slug].claim} | | {NOT_RUN} | {_command(slug)} |\n"
    measured = "<br>".join(map(str, figures_of(record)))
    verdict = f"[{record['verdict']}](results/{slug}.png)"
    if not record["verdict"].startswith("shown"):
        verdict += f": {record['why']}"
    run = f"`{record['command']}`<br>{_circumstances(record)}"
    return f"| {paper} | {record['claim']} | {measured} | {verdict} | {run} |\n"


def _command(slug: str) -> str:
    return f"`hf-attn claim {slug}`" if slug in claims() else "no run"


def _circumstances(record: dict[str, Any]) -> str:
    return f"{record['date']}, {record['machine']}, {record['seconds'] / 60:.1f} minutes"
