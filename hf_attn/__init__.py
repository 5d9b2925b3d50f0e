"""Attention research as Hugging Face components.

Importing this package registers every family of the catalogue with transformers' Auto classes, every attention
function with ``attn_implementation`` and every PEFT default, without importing any of them: a class is imported when
it is first needed. The classes of the families are attributes of the package:

    from hf_attn import EchoAttForCausalLM
"""

from importlib import import_module

from .catalog import class_references
from .registration import load, register


__version__ = "0.1.0"

#: public name -> module that defines it
_PUBLIC = {
    "PAPERS": "catalog",
    "from_official": "conversion",
    "uses_attention": "attention",
}
_CLASSES = class_references()

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name in _CLASSES:
        return load(_CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_CLASSES})


register()
