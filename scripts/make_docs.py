"""Write what README.md and docs/ take from the catalogue and from the results of claims, and build the site with mkdocs.

python scripts/make_docs.py            # write, then build into build/site
python scripts/make_docs.py --no-build # write only
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hf_attn.catalog import OWN_AUTO_CLASSES, PACKAGE_DOORS, PAPERS, Paper, paper_references
from hf_attn.claims.pages import claims_page, featured_section, paper_section


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAPERS_MARKERS = "<!-- papers: written by `make docs` -->", "<!-- end of papers -->"
FEATURED_MARKERS = "<!-- result: written by `make docs` -->", "<!-- end of result -->"
CLAIM_MARKERS = "<!-- claim: written by `make docs` -->", "<!-- end of claim -->"


def _row(paper: Paper, pages: str) -> str:
    title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
    note = f" ({paper.note})" if paper.note else ""
    slug = f"[`{paper.slug}`]({pages}{paper.slug}.md)" if paper.available else f"`{paper.slug}`"
    return f"| {slug} | {title} | {paper.becomes}{note} |"


def papers_table(pages: str) -> str:
    """The available papers as a Markdown table; planned ones, if there are any, are folded away.

    Args:
        pages: path to the folder of the papers' pages, with a slash at its end, or empty.
    """
    header = ["| | paper | becomes |", "|---|---|---|"]
    available = [_row(paper, pages) for paper in PAPERS.values() if paper.available]
    planned = [_row(paper, pages) for paper in PAPERS.values() if not paper.available]
    lines = [*header, *available]
    if planned:
        lines += ["", f"<details><summary>{len(planned)} planned papers</summary>", ""]
        lines += [*header, *planned, "", "</details>"]
    return "\n".join(lines)


def _between(text: str, markers: tuple[str, str], written: str, name: str) -> str:
    start, end = markers
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{name} must contain the lines {start} and {end}.")
    return f"{before}{start}\n{written}\n{end}{after}"


def generated_readme(readme: str) -> str:
    """The text of the README with the table of papers and the featured result between their markers."""
    readme = _between(readme, PAPERS_MARKERS, papers_table("docs/papers/"), "README.md")
    return _between(readme, FEATURED_MARKERS, featured_section(RESULTS), "README.md")


def with_claim(slug: str, page: str) -> str:
    """The text of a paper's page with its claim between the two markers."""
    return _between(page, CLAIM_MARKERS, paper_section(slug, RESULTS, "../results"), f"docs/papers/{slug}.md")


def _reference(paper: Paper) -> str:
    return _page(paper.slug, f"[The paper's page](../papers/{paper.slug}.md)", paper_references(paper).values())


def _page(title: str, text: str, references) -> str:
    return "\n\n".join([f"# {title}", text, *map(_documented, references)]) + "\n"


def _documented(reference: str) -> str:
    module, _, name = reference.rpartition(".")
    if module == "hf_attn.auto":  # made from the catalogue, which a static parser does not evaluate
        return f"## `{name}`\n\nAuto class for {OWN_AUTO_CLASSES[name]}, used like those of transformers."
    return f"::: {reference}"


def generated_pages() -> dict[str, str]:
    """Path below `docs/` -> text of each page that is written from the catalogue and from results, or holds a part that is."""
    documented = [paper for paper in PAPERS.values() if paper.available]
    pages = {
        "papers/index.md": f"# Papers\n\n{papers_table('')}\n",
        "reference/index.md": "# Reference\n\n"
        + "Everything here can be imported from `hf_attn`.\n\n"
        + "- [The package](package.md)\n"
        + "".join(f"- [`{paper.slug}`]({paper.slug}.md)\n" for paper in documented),
        "reference/package.md": _page(
            "The package", "Functions and classes that do not belong to one paper.", PACKAGE_DOORS.values()
        ),
    }
    pages["claims.md"] = claims_page(RESULTS)
    for paper in documented:
        path = f"papers/{paper.slug}.md"
        pages[path] = with_claim(paper.slug, (ROOT / "docs" / path).read_text(encoding="utf-8"))
        pages[f"reference/{paper.slug}.md"] = _reference(paper)
    return pages


def write() -> None:
    """Write the generated parts of README.md and the generated pages."""
    readme = ROOT / "README.md"
    readme.write_text(generated_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for name, text in generated_pages().items():
        path = ROOT / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def build() -> int:
    """Build the site; warnings are errors. Returns the exit code of mkdocs."""
    # The reference is read from the sources, which lie in three folders of the repository, in the shape of the package.
    package = ROOT / "build" / "reference" / "hf_attn"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in [*(ROOT / "hf_attn").iterdir(), ROOT / "modeling", ROOT / "pipelines"]:
        (package / source.name).symlink_to(source)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help="write the pages without building the site")
    options = parser.parse_args()
    write()
    return 0 if options.no_build else build()


if __name__ == "__main__":
    sys.exit(main())
