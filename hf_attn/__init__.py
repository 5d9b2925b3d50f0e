"""Attention research as Hugging Face components.

Importing this package registers every family of the catalogue with transformers' Auto classes, every attention
function with `attn_implementation` and every PEFT default, without importing any of them: a class is imported when
it is first needed. The classes of the families, and the functions of the papers, are attributes of the package:

    from hf_attn import EchoAttForCausalLM, apply_clear
"""

from . import _moved
from .catalog import public_names
from .registration import load, register


__version__ = "0.1.0"

_REFERENCES = public_names()

__all__ = ["__version__", *_REFERENCES]


def __getattr__(name: str):
    if name in _REFERENCES:
        return load(_REFERENCES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
_moved.install()
