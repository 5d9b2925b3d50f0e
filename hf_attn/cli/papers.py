"""`hf-attn papers`: the catalogue."""

import argparse
import json

from ..catalog import PAPERS, Paper
from ._command import formatter


def add_parser(commands) -> None:
    papers = commands.add_parser(
        "papers",
        help="list the papers and their implementations",
        description="List the papers of the catalogue, their components, and whether they are available.",
        formatter_class=formatter,
    )
    papers.add_argument("--json", action="store_true", help="print the whole catalogue as JSON")
    papers.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.json:
        from ..attention import MECHANISMS

        names = {mechanism.name: mechanism.names for mechanism in MECHANISMS}
        print(json.dumps([_facts(paper, names) for paper in PAPERS.values()], indent=2))
        return
    rows = [("SLUG", "ARXIV", "STATUS", "BECOMES")]
    rows += [(paper.slug, paper.arxiv, paper.status, paper.becomes) for paper in PAPERS.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    available = sum(paper.available for paper in PAPERS.values())
    print(f"\n{available} of {len(PAPERS)} papers are available.")


def _facts(paper: Paper, names: dict[str, tuple[str, ...]]) -> dict:
    """The entry of a paper as JSON values.

    Args:
        paper: the paper.
        names: attention function -> its name and those of its implementations.
    """
    return {
        "slug": paper.slug,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "status": paper.status,
        "becomes": paper.becomes,
        "code": paper.code or None,
        "model_types": {
            family.model_type: {auto: family.model_reference(auto) for auto in family.models}
            for family in paper.families
        },
        "attention": [name for function in paper.attention for name in names.get(function, (function,))],
        "converts_official_checkpoints": paper.converter,
    }
