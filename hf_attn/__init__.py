"""Attention research as Hugging Face components.

Importing this package registers every family of the catalogue with transformers' Auto classes, every attention
function with ``attn_implementation`` and every PEFT default, without importing any of them: a class is imported when
it is first needed. The classes of the families, and the functions of the papers, are attributes of the package:

    from hf_attn import EchoAttForCausalLM, apply_clear
"""

from . import _moved
from .catalog import OWN_AUTO_CLASSES, class_references
from .registration import load, register


__version__ = "0.1.0"

#: public name -> ``package.module.name``
_PUBLIC = {
    "PAPERS": "hf_attn.catalog.PAPERS",
    "from_official": "hf_attn.checkpoints.official.from_official",
    "uses_attention": "hf_attn.attention.uses_attention",
    **{name: f"hf_attn.auto.{name}" for name in OWN_AUTO_CLASSES},
    **class_references(),
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return load(_PUBLIC[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
_moved.install()
