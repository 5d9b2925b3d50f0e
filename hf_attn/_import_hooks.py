"""Run a function once another module has been imported, whichever of the two comes first."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


_WAITING: dict[str, list[Callable[[ModuleType], None]]] = {}


class _PostImportFinder:
    """Meta-path finder that finds nothing itself: it lets the others find a module and hooks into its loader."""

    def find_spec(self, fullname, path=None, target=None):
        callbacks = _WAITING.pop(fullname, None)
        if callbacks is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            _WAITING[fullname] = callbacks
            return None
        exec_module = spec.loader.exec_module

        def exec_and_call(module):
            exec_module(module)
            for callback in callbacks:
                callback(module)

        spec.loader.exec_module = exec_and_call
        return spec


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback(module)`` now if the module ``name`` is imported already, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())
    _WAITING.setdefault(name, []).append(callback)
