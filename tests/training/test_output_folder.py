import json
import os

import pytest

from hf_attn.training.output_folder import RECORD, OutputFolderError, claim_output_folder, output_folder


SETTINGS = {"steps": 3, "weights": (0.5, 0.5)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_created_and_the_same_run_continues(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert not claim_output_folder(folder, SETTINGS, command="x.py")
    assert json.loads((folder / RECORD).read_text()) == {
        "command": "x.py",
        "settings": {"steps": 3, "weights": [0.5, 0.5]},
    }
    assert claim_output_folder(folder, SETTINGS, command="x.py")
    assert names(folder.parent) == ["run"]


def test_an_empty_folder_is_taken(tmp_path):
    assert not claim_output_folder(tmp_path, SETTINGS)


def test_another_run_is_named(tmp_path):
    claim_output_folder(tmp_path, SETTINGS, command="x.py")
    with pytest.raises(OutputFolderError, match=r"steps \(3 -> 4\).*Choose another folder"):
        claim_output_folder(tmp_path, {**SETTINGS, "steps": 4}, command="x.py")
    with pytest.raises(OutputFolderError, match=r"contains a run of x\.py"):
        claim_output_folder(tmp_path, SETTINGS, command="y.py")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("record", [None, "{half", '["no run"]'])
def test_what_no_run_has_written_is_left_alone(tmp_path, record, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    if record is not None:
        (tmp_path / RECORD).write_text(record)
    before = names(tmp_path)
    with pytest.raises(OutputFolderError, match="not empty and contains no run of hf_attn"):
        claim_output_folder(tmp_path, SETTINGS, overwrite=overwrite)
    with pytest.raises(OutputFolderError), output_folder(tmp_path, SETTINGS, overwrite=overwrite):
        pass
    assert names(tmp_path) == before


def test_an_earlier_run_is_moved_aside(tmp_path, capsys):
    folder = tmp_path / "run"
    for steps in (1, 2, 3):
        with output_folder(folder, {"steps": steps}, overwrite=True) as continued:
            assert not continued
            (folder / "weights").write_text(str(steps))
    assert names(tmp_path) == ["run", "run.earlier-1", "run.earlier-2"]
    assert [(tmp_path / name / "weights").read_text() for name in names(tmp_path)] == ["3", "1", "2"]
    assert all(names(tmp_path / name) == [RECORD, "weights"] for name in names(tmp_path))
    assert "run.earlier-2" in capsys.readouterr().out


def test_neither_the_current_folder_nor_an_input_is_moved(tmp_path, monkeypatch):
    claim_output_folder(tmp_path / "run", SETTINGS)
    with pytest.raises(OutputFolderError, match=r"--model .*run is part of the run"):
        claim_output_folder(tmp_path / "run", {"model": str(tmp_path / "run")}, overwrite=True)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(OutputFolderError, match="is the current folder"):
        claim_output_folder(".", SETTINGS, overwrite=True)
    assert names(tmp_path) == ["run"]


def test_a_folder_has_one_run_at_a_time(tmp_path):
    for overwrite in (False, True):
        with output_folder(tmp_path / "run", SETTINGS, overwrite):
            (tmp_path / "run" / "weights").touch()
            with pytest.raises(OutputFolderError, match="another run is active"):
                output_folder(tmp_path / "run", SETTINGS).__enter__()
            with pytest.raises(OutputFolderError, match="another run is active"):
                output_folder(tmp_path / "run", SETTINGS, overwrite=True).__enter__()
    with output_folder(tmp_path / "run", SETTINGS) as continued:
        assert continued


def test_runs_that_do_not_continue_by_themselves(tmp_path):
    options = {"command": "x.py", "continues": False}
    claim_output_folder(tmp_path, SETTINGS, **options)
    with pytest.raises(OutputFolderError, match=r"an earlier run\. `--overwrite_output_dir`"):
        claim_output_folder(tmp_path, SETTINGS, **options)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(OutputFolderError, match="`--resume_from_checkpoint last` continues it"):
        claim_output_folder(tmp_path, SETTINGS, **options)
    assert claim_output_folder(tmp_path, {"steps": 9}, resume=True, **options)


@pytest.mark.parametrize(
    ("options", "checkpoint", "advice"),
    [
        ({}, False, "Run the same command to continue"),
        ({"continues": False}, True, "`--resume_from_checkpoint last`"),
        ({"continues": False}, False, "There is no checkpoint yet"),
    ],
)
def test_an_interruption_says_how_to_continue(tmp_path, capsys, options, checkpoint, advice):
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "run", SETTINGS, **options):
        if checkpoint:
            os.mkdir(tmp_path / "run" / "checkpoint-5")
        raise KeyboardInterrupt
    assert advice in capsys.readouterr().err


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        claim_output_folder(tmp_path / "file", SETTINGS)
    with pytest.raises(OutputFolderError, match="is a file"), output_folder(tmp_path / "file", SETTINGS):
        pass


def test_a_run_that_stops_at_once_leaves_nothing(tmp_path):
    def fail(folder):
        with output_folder(folder, SETTINGS, continues=False):
            raise ValueError("a file is missing")

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(ValueError, match="a file is missing"):
            fail(tmp_path / name)
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []
