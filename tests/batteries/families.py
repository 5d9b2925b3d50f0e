"""Small models of every family in the catalogue, for tests that hold for all of them."""

from importlib import import_module
from pathlib import Path

from hf_attn.catalog import Family, find_family
from hf_attn.registration import load


def tiny_config(model_type: str):
    """The configuration on which the family runs transformers' own tests (`get_config` of its test class)."""
    paper, _ = find_family(model_type)
    folder = Path(__file__).parents[1] / "modeling" / paper.slug
    for path in sorted(folder.glob("test_*.py"), key=lambda path: "upstream" not in path.name):
        for value in vars(import_module(f"tests.modeling.{paper.slug}.{path.stem}")).values():
            if getattr(value, "model_type", None) == model_type and hasattr(value, "get_config"):
                return value().get_config()
    raise LookupError(f"No test class in {folder} has model_type = {model_type!r} and a get_config.")


def main_auto_class(family: Family) -> str:
    """The Auto class of the model that people use: one with a head, if there is any."""
    return next((name for name in family.models if name not in ("AutoModel", "AutoBackbone")), "AutoModel")


def tiny_model(family: Family, auto_class: str | None = None):
    """A model with random weights, in eval mode.

    Args:
        family: the family.
        auto_class: which of its models; the one with a head if not given.
    """
    model_class = load(family.model_reference(auto_class or main_auto_class(family)))
    return model_class(tiny_config(family.model_type)).eval()
