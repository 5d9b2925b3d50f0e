"""`hf-attn claim`."""

import json

import pytest

from hf_attn.claims.result import Conclusion, Figure
from hf_attn.claims.runs import clear
from hf_attn.cli import main


@pytest.fixture
def quick(monkeypatch):
    """A run of CLEAR without computation; returns the number of measurements."""
    calls = []

    def measured():
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return len(calls)

    def measure(work):
        return {"first": work.part("first", lambda: 7), "second": work.part("second", measured)}

    def conclude(data):
        return Conclusion((Figure.of("second", "s", data["second"]),), "shown", "It was measured.")

    monkeypatch.setattr(clear, "measure", measure)
    monkeypatch.setattr(clear, "conclude", conclude)
    monkeypatch.setattr(clear, "draw", lambda data, figure: figure.subplots().plot([1, 2]))
    return calls


def test_an_interrupted_run_is_resumed_and_stored_on_request(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["claim", "clear"]) == 130
    assert "first ..." in capsys.readouterr().out
    assert main(["claim", "clear"]) == 0
    out = capsys.readouterr().out
    assert "first: finished before" in out and "second ..." in out
    assert "now:    second 2 s" in out and "stored: -" in out
    assert not (tmp_path / "docs").exists()

    assert main(["claim", "clear", "--store"]) == 0
    assert len(quick) == 2
    assert json.loads((tmp_path / "docs/results/clear.json").read_text())["figures"][0]["value"] == 2
    assert (tmp_path / "docs/results/clear.png").is_file()

    capsys.readouterr()
    assert main(["claim", "clear", "--output", "another"]) == 0
    out = capsys.readouterr().out
    assert "now:    second 3 s" in out and "stored: second 2 s" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name papers, or use --all"),
        (["clear", "--all"], "Name papers, or use --all"),
        (["clearly"], "no paper 'clearly'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["claim", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(quick, tmp_path, capsys):
    (tmp_path / "clear").mkdir()
    (tmp_path / "clear" / "thesis.tex").write_text("x")
    assert main(["claim", "clear", "--output", str(tmp_path)]) == 2
    assert "contains no run of hf_attn" in capsys.readouterr().err
