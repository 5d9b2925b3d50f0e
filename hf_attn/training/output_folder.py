"""Output folders of long runs: continued by the same run, never overwritten by another one unasked."""

import json
import shutil
from pathlib import Path
from typing import Any


class OutputFolderError(ValueError):
    """The folder holds something else; the message says what and how to go on."""


def claim_output_folder(folder: str | Path, settings: dict[str, Any], overwrite: bool = False) -> bool:
    """Reserve a folder for a run with these settings.

    Args:
        folder: output folder, created if it does not exist.
        settings: what the results depend on, as JSON values; kept in the folder as `settings.json`.
        overwrite: delete what is in the folder.

    Returns:
        Whether the folder belongs to an earlier run with the same settings, which is to be continued.

    Raises:
        OutputFolderError: if the folder is not empty and belongs to something else.
    """
    folder = Path(folder)
    record = folder / "settings.json"
    # As JSON gives it back: tuples are lists.
    settings = json.loads(json.dumps(settings))
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, not a folder.")
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    if folder.is_dir() and any(folder.iterdir()):
        try:
            earlier = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise OutputFolderError(
                f"{folder} is not empty and holds no run of this kind. Choose another folder, or ask for it to be overwritten."
            ) from None
        if earlier != settings:
            names = sorted(name for name in {*earlier, *settings} if earlier.get(name) != settings.get(name))
            changes = ", ".join(f"{name} ({earlier.get(name)!r} -> {settings.get(name)!r})" for name in names)
            raise OutputFolderError(
                f"{folder} holds a run with other settings: {changes}. Choose another folder, or ask for it to be "
                "overwritten."
            )
        return True
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a run that is killed here leaves an empty record nowhere.
    part = folder.parent / f".{folder.name}-settings.part"
    part.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    part.rename(record)
    return False
