"""Files and folders are written completely or not at all."""

import pytest

from hf_attn.training.writing import written_whole


def test_a_file_and_a_folder_replace_what_was_there(tmp_path):
    for text in ("old", "new"):
        with written_whole(tmp_path / "deep" / "file.txt") as part:
            part.write_text(text)
        with written_whole(tmp_path / "deep" / "folder") as part:
            part.mkdir()
            (part / f"{text}.txt").write_text(text)
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["new.txt"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["file.txt", "folder"]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("earlier")
    with pytest.raises(type(error)), written_whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "weights").write_text("half")
        raise error
    assert (tmp_path / "folder" / "weights").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".file.part").mkdir()
    with written_whole(tmp_path / "file") as part:
        part.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
