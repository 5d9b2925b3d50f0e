"""The documentation of the claims, written from the stored results."""

from collections import Counter
from pathlib import Path
from typing import Any

from ..catalog import PAPERS
from .result import VERDICTS, figures_of, read_result
from .run import claims


NOT_RUN = "not run yet"
#: paper whose result the README shows
FEATURED = "landmark"
_HEAD = """\
# What the papers claim, shown in small

Each paper's main claim in one sentence, and what a run on a small machine measured. {counts}.

- **shown**: exact, such as a count of operations;
- **shown in small**: holds for small models and data, which says nothing about large ones;
- **not shown here**: the run does not decide it, or it needs weights, data or a GPU;
- **contradicted here**: the figures say the opposite.

Each verdict follows from the figures by a rule, which is stated in the docstring of the run's module in `hf_attn/claims/runs`.
`hf-attn claim SLUG` repeats a run and prints its figures beside the stored ones.

| paper | claim | verdict | measured here | run |
|---|---|---|---|---|
"""


def claims_page(results: str | Path) -> str:
    """The page with all claims, from the results in a folder."""
    records = {slug: read_result(results, slug) for slug in PAPERS}
    verdicts = Counter(NOT_RUN if record is None else record["verdict"] for record in records.values())
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in (*VERDICTS, NOT_RUN) if verdicts[verdict])
    head = _HEAD.format(counts=f"Of {len(records)} claims: {counts}")
    return head + "".join(_row(slug, record) for slug, record in records.items())


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


def featured_section(results: str | Path) -> str:
    """The figure of the featured paper with its measurements, for the README.

    Args:
        results: folder with the results.

    Raises:
        ValueError: if the featured claim has no result.
    """
    record = read_result(results, FEATURED)
    if record is None:
        raise ValueError(
            f"The README shows the claim of {FEATURED}, which has no result: run `hf-attn claim {FEATURED}`."
        )
    figure = figures_of(record)[0]
    return (
        f"![What was measured of {FEATURED}](docs/results/{FEATURED}.png)\n\n"
        f"*[{FEATURED}](docs/papers/{FEATURED}.md): {PAPERS[FEATURED].claim[:-1]}. Here: {figure}; mean and standard deviation over"
        f" {record['seeds']} seeds (`{record['command']}`).*"
    )


def _row(slug: str, record: dict[str, Any] | None) -> str:
    paper = f"[`{slug}`](papers/{slug}.md)"
    if record is None:
        return f"| {paper} | {PAPERS[slug].claim} | {NOT_RUN} | | {_command(slug)} |\n"
    measured = "<br>".join(map(str, figures_of(record)))
    verdict = f"[{record['verdict']}](results/{slug}.png)"
    if not record["verdict"].startswith("shown"):
        verdict += f": {record['why']}"
    run = f"`{record['command']}`<br>{_circumstances(record)}"
    return f"| {paper} | {record['claim']} | {verdict} | {measured} | {run} |\n"


def _command(slug: str) -> str:
    return f"`hf-attn claim {slug}`" if slug in claims() else "no run"


def _circumstances(record: dict[str, Any]) -> str:
    return f"{record['date']}, {record['machine']}, {record['seconds'] / 60:.1f} minutes"
