"""Atomic writing of files and folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def part_of(path: str | Path) -> Path:
    """Where [`written_whole`] has a file or folder until it is complete, for processes that write it together."""
    path = Path(path)
    return path.with_name(f".{path.name}.part")


@contextmanager
def files_written_whole(folder: str | Path) -> Iterator[Path]:
    """Write files into a folder that may hold others: they are moved there when the block ends.

    If the block raises, nothing in the folder has changed.

    Args:
        folder: where the files go; it is created. Files of the same names are replaced, others stay.

    Yields:
        An empty folder to write to.
    """
    folder = Path(folder)
    part = part_of(folder)
    _remove(part)
    part.mkdir(parents=True)
    try:
        yield part
        folder.mkdir(exist_ok=True)
        for path in part.iterdir():
            os.replace(path, folder / path.name)
    finally:
        _remove(part)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file or a folder under another name beside it, and rename it when the block ends.

    What was at `path` stays until the new one is complete; if the block raises, or the process is killed, it stays for
    good. A file replaces a file, a folder a folder.

    Args:
        path: the file or folder to write; its parent folder is created.

    Yields:
        The path to write to, where nothing is.

    Example:
        with written_whole(folder / "results.json") as part:
            part.write_text(json.dumps(results))
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, earlier = part_of(path), path.with_name(f".{path.name}.earlier")
    _remove(part)
    try:
        yield part
    except BaseException:
        _remove(part)
        raise
    if path.is_dir():
        # A folder cannot be replaced atomically: between the two renames nothing is at `path`, and both versions are next to it.
        _remove(earlier)
        path.rename(earlier)
    os.replace(part, path)
    _remove(earlier)
