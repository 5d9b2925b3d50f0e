import json

import pytest

from hf_attn.training.output_folder import OutputFolderError, claim_output_folder


SETTINGS = {"steps": 3, "weights": (0.5, 0.5)}


def test_a_new_folder_is_created_and_the_same_run_continues(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert not claim_output_folder(folder, SETTINGS)
    assert json.loads((folder / "settings.json").read_text())["steps"] == 3
    assert claim_output_folder(folder, SETTINGS)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_an_empty_folder_is_taken(tmp_path):
    assert not claim_output_folder(tmp_path, SETTINGS)


def test_other_settings_are_named(tmp_path):
    claim_output_folder(tmp_path, SETTINGS)
    with pytest.raises(OutputFolderError, match=r"steps \(3 -> 4\).*Choose another folder"):
        claim_output_folder(tmp_path, {**SETTINGS, "steps": 4})


@pytest.mark.parametrize("record", [None, "{half"])
def test_what_is_there_is_never_overwritten_unasked(tmp_path, record):
    (tmp_path / "thesis.tex").write_text("years of work")
    if record is not None:
        (tmp_path / "settings.json").write_text(record)
    with pytest.raises(OutputFolderError, match="not empty and holds no run of this kind"):
        claim_output_folder(tmp_path, SETTINGS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not claim_output_folder(tmp_path, SETTINGS, overwrite=True)
    assert not (tmp_path / "thesis.tex").exists()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        claim_output_folder(tmp_path / "file", SETTINGS)
