"""Output folders of long runs: one run at a time, continued by the same run, and never overwritten.

A new run in the folder of an earlier one renames the earlier folder. Files that no run of this package has written are
never changed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .writing import written_whole


#: marks a folder as written by a run of this package; Trainer pushes no file whose name starts with "_"
RECORD = "_hf_attn_run.json"
LOCK = "_hf_attn_run.lock"


#: what Trainer calls the folders of its checkpoints
CHECKPOINTS = "checkpoint-*"


class OutputFolderError(ValueError):
    """The folder contains something else; the message explains how to continue."""


def claim_output_folder(
    folder: str | Path,
    settings: dict[str, Any],
    overwrite: bool = False,
    *,
    command: str = "",
    continues: bool = True,
    resume: bool = False,
    checkpoints: str = CHECKPOINTS,
) -> bool:
    """Reserve a folder for a run with these settings.

    Args:
        folder: output folder, created if it does not exist.
        settings: what the results depend on, as JSON values; kept in the folder.
        overwrite: start a new run; an earlier run in the folder is renamed to `NAME.earlier-N`.
        command: name of the script or command.
        continues: whether the same settings continue the run that is in the folder.
        resume: whether the user asked to continue what is in the folder; then its settings are not compared.
        checkpoints: pattern of the folders in it that `--resume_from_checkpoint last` continues from.

    Returns:
        Whether the folder belongs to an earlier run, which is to be continued.

    Raises:
        OutputFolderError: if the folder is not empty and belongs to something else.
    """
    folder = Path(folder)
    # As JSON gives it back: tuples are lists.
    settings = json.loads(json.dumps(settings, default=str))
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, not a folder.")
    if _is_used(folder):
        earlier = _read_record(folder)
        if earlier is None and not resume:
            last = (
                "; `--resume_from_checkpoint last` continues from its checkpoint"
                if any(folder.glob(checkpoints))
                else ""
            )
            raise OutputFolderError(
                f"{folder} is not empty and contains no run of hf_attn, so it is left unchanged. Choose another "
                f"folder{'' if continues else last}."
            )
        if not overwrite:
            if continues:
                _check_same_run(folder, earlier, command, settings)
            elif not resume:
                last = " `--resume_from_checkpoint last` continues it," if any(folder.glob(checkpoints)) else ""
                raise OutputFolderError(
                    f"{folder} is not empty: it contains an earlier run.{last} `--overwrite_output_dir` starts a new "
                    "run and keeps the earlier one under another name. Alternatively, choose another folder."
                )
            return True
        _move_aside(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / RECORD) as part:
        part.write_text(json.dumps({"command": command, "settings": settings}, indent=2), encoding="utf-8")
    return False


@contextmanager
def output_folder(
    folder: str | Path, settings: dict[str, Any], overwrite: bool = False, **options: Any
) -> Iterator[bool]:
    """Claim a folder and hold it as long as the run takes: a second run in it is refused.

    Args:
        folder, settings, overwrite, options: see [`claim_output_folder`].

    Yields:
        Whether an earlier run is continued.

    Raises:
        OutputFolderError: if the folder holds something else, or another run is at work in it.
    """
    with locked(folder) as lock_again:
        continued = claim_output_folder(folder, settings, overwrite, **options)
        lock_again()
        if continued and options.get("continues", True):
            print(f"Continuing the run in {folder}.")
        try:
            yield continued
        except KeyboardInterrupt:
            if options.get("continues", True):
                advice = "Run the same command to continue it."
            elif any(Path(folder).glob(options.get("checkpoints", CHECKPOINTS))):
                advice = (
                    "Run the same command with `--resume_from_checkpoint last` to continue from the last checkpoint."
                )
            else:
                advice = "There is no checkpoint yet: `--overwrite_output_dir` starts a new run."
            print(f"\nInterrupted; the run is in {folder}. {advice}", file=sys.stderr)
            raise
        finally:
            # A run that stopped immediately, for example because of a missing file, does not block the next one.
            if not continued and {path.name for path in Path(folder).iterdir()} <= {RECORD, LOCK}:
                (Path(folder) / RECORD).unlink(missing_ok=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[Callable[[], None]]:
    """Hold a folder, which is created, against other processes.

    Yields:
        What takes the lock again, in the folder that has come into the place of this one.

    Raises:
        OutputFolderError: if another process holds it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, not a folder.")
    locks: list[FileLock] = []

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if locks and Path(locks[-1].lock_file).exists():
            return
        file_lock = FileLock(folder / LOCK)
        try:
            file_lock.acquire(blocking=False)
        except Timeout:
            raise OutputFolderError(
                f"another run is active in {folder}. Wait until it has finished, or choose another folder."
            ) from None
        locks.append(file_lock)

    is_new = not folder.exists()
    try:
        lock()
        yield lock
    finally:
        for file_lock in locks:
            Path(file_lock.lock_file).unlink(missing_ok=True)
            file_lock.release()
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_used(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run of this package in its folder; None if there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def _check_same_run(folder: Path, earlier: dict[str, Any], command: str, settings: dict[str, Any]) -> None:
    advice = "Choose another folder, or start a new run with `--overwrite_output_dir`, which renames the earlier one."
    if earlier["command"] != command:
        raise OutputFolderError(f"{folder} contains a run of {earlier['command'] or 'another command'}. {advice}")
    before = earlier["settings"]
    if before != settings:
        names = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
        changes = ", ".join(f"{name} ({before.get(name)!r} -> {settings.get(name)!r})" for name in names)
        raise OutputFolderError(f"{folder} contains a run with other settings: {changes}. {advice}")


def _move_aside(folder: Path, settings: dict[str, Any]) -> None:
    resolved = folder.resolve()
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise OutputFolderError(
            f"{folder} is the current folder, which cannot be renamed. Change the working directory, or choose "
            "another output folder."
        )
    for name, value in settings.items():
        for path in value if isinstance(value, list) else [value]:
            if (
                isinstance(path, str)
                and path
                and Path(path).exists()
                and Path(path).resolve().is_relative_to(resolved)
            ):
                raise OutputFolderError(
                    f"--{name} {path} is part of the run in {folder}, which would be renamed. Choose another output "
                    "folder."
                )
    number = 1
    while (aside := resolved.with_name(f"{resolved.name}.earlier-{number}")).exists():
        number += 1
    os.rename(resolved, aside)
    (aside / LOCK).unlink(missing_ok=True)
    print(f"The earlier run in {folder} was moved to {aside}.")
