"""Changes made in place to models of other libraries."""

from importlib import import_module


__all__ = ["apply_fast_attention", "remove_fast_attention"]


def __getattr__(name: str):
    # Patches import what they change, which an import of another patch has no need of.
    if name in __all__:
        return getattr(import_module(".deberta", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
