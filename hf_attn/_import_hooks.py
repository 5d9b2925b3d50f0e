"""Run a function once another module has been imported, or at once if it already is."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


_WAITING: dict[str, list[Callable[[ModuleType], None]]] = {}


class _PostImportFinder:
    """Meta-path finder that finds nothing itself: it lets the others find a module and hooks into its loader."""

    def __init__(self):
        self._finding: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _WAITING or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_call(module):
            exec_module(module)
            # Only once the import has succeeded: one that failed may be tried again.
            for callback in _WAITING.pop(module.__name__, ()):
                callback(module)

        spec.loader.exec_module = exec_and_call
        return spec


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` now if the module `name` is imported already, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())
    _WAITING.setdefault(name, []).append(callback)
