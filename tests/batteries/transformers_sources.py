"""Provide transformers' own common model tests, which the installed package does not contain.

They are in the source distribution of the installed version, fetched by pip into the user's cache and never committed.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock


PACKAGE = "transformers_tests"

#: modules of transformers' repository that the source distribution leaves out, cut down to what the others import
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


class CannotFetch(RuntimeError):
    """The source distribution of transformers could not be fetched."""


def cache_folder() -> Path:
    """Folder of the package; there is one per version of transformers."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hf_attn" / f"transformers-{transformers.__version__}-tests"


def fetch(folder: Path) -> None:
    """Download the source distribution and unpack its tests as a package; safe under several processes.

    Raises:
        CannotFetch: with the last lines of pip's output.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _download(Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            _unpack(next(Path(temporary).glob("transformers-*.tar.gz")), unpacked / PACKAGE)
            unpacked.rename(folder)


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    requirement = f"transformers=={transformers.__version__}"
    result = subprocess.run([*command, requirement], capture_output=True, text=True)
    if result.returncode != 0:
        raise CannotFetch(f"pip could not download the source distribution of {requirement}: {result.stderr[-1000:]}")


def _unpack(archive: Path, package: Path) -> None:
    with tarfile.open(archive) as tar:
        root = tar.getnames()[0].split("/")[0]
        for member in tar.getmembers():
            if member.name.startswith(f"{root}/tests/") and member.name.endswith(".py"):
                member.name = member.name.removeprefix(f"{root}/tests/")
                tar.extract(member, package, filter="data")
    for name, source in STUBS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    for directory in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()


@cache
def try_to_fetch(folder: Path) -> str:
    """The reason why the package cannot be fetched, if any; fetching is tried once per process."""
    try:
        fetch(folder)
    except CannotFetch as error:
        return str(error)
    return ""


def load(module: str) -> ModuleType:
    """Import a module of transformers' tests, fetched first if need be.

    Raises:
        CannotFetch: if they are not in the cache and cannot be downloaded.
    """
    folder = cache_folder()
    problem = try_to_fetch(folder)
    if problem:
        raise CannotFetch(problem)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return import_module(f"{PACKAGE}.{module}")
