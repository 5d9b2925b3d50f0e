"""Scripts of the repository, loaded as modules."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


SCRIPTS = Path(__file__).parents[2] / "scripts"


@contextmanager
def loaded_script(name: str, module_name: str | None = None) -> Iterator[ModuleType]:
    """The module of `scripts/<name>.py`, which is in `sys.modules` within this context.

    Dataclasses look their module up by its name, and so does the unpickling of training arguments in a checkpoint.
    """
    spec = importlib.util.spec_from_file_location(module_name or name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module
