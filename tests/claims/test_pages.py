"""The table of claims and the section of a page."""

from hf_attn.catalog import PAPERS
from hf_attn.claims.pages import claims_page, paper_section
from hf_attn.claims.result import Conclusion, Figure, write_result


def stored(folder, slug, verdict):
    conclusion = Conclusion((Figure.of("accuracy", "%", 91.0, "ViT", 90.0),), verdict, "Because of this.")
    write_result(folder / f"{slug}.json", slug, PAPERS[slug].claim, conclusion, date="2026-01-02", seconds=90.0)


def rows(folder):
    lines = claims_page(folder).splitlines()
    return {slug: next(line for line in lines if line.startswith(f"| [`{slug}`]")) for slug in PAPERS}


def test_every_paper_has_a_row(tmp_path):
    stored(tmp_path, "tnt", "shown in small")
    stored(tmp_path, "hat", "contradicted here")
    table = rows(tmp_path)
    assert "accuracy 91 % (ViT: 90 %)" in table["tnt"] and "2026-01-02" in table["tnt"]
    assert "[shown in small](results/tnt.png)" in table["tnt"] and "Because" not in table["tnt"]
    assert "contradicted here](results/hat.png): Because of this." in table["hat"]
    assert [slug for slug, row in table.items() if "not run yet" in row] == [
        s for s in PAPERS if s not in ("tnt", "hat")
    ]
    assert all(paper.claim in table[slug] for slug, paper in PAPERS.items())


def test_the_section_of_a_page(tmp_path):
    stored(tmp_path, "tnt", "shown in small")
    section = paper_section("tnt", tmp_path, "../results")
    assert "Verdict: **shown in small**. Because of this." in section
    assert "`hf-attn claim tnt`: 2026-01-02" in section and "1.5 minutes" in section
    assert "](../results/tnt.png)" in section
    assert "not run yet" in paper_section("hat", tmp_path, "../results")
