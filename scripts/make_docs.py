"""Write the table of papers in README.md from the catalogue (`make docs`)."""

from pathlib import Path

from hf_attn.catalog import PAPERS


README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- papers: written by `make docs` -->", "<!-- end of papers -->"


def papers_table() -> str:
    """The catalogue as a Markdown table, available papers first."""
    lines = ["| | paper | becomes | status |", "|---|---|---|---|"]
    for paper in sorted(PAPERS.values(), key=lambda paper: not paper.available):
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        lines.append(f"| `{paper.slug}` | {link} | {paper.becomes} | {paper.status} |")
    return "\n".join(lines)


def with_papers_table(readme: str) -> str:
    """The text of the README with the table that belongs between its two markers."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the lines {START} and {END}.")
    return f"{before}{START}\n{papers_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_papers_table(README.read_text(encoding="utf-8")), encoding="utf-8")
