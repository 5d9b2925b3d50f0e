"""Small models of every family in the catalogue, for tests that apply to all of them."""

from hf_attn.architectures.variants import TINY
from hf_attn.catalog import Family, find_family
from hf_attn.registration import load


def tiny_config(model_type: str, **overrides):
    """The variant `"tiny"` of the family's configuration."""
    _, family = find_family(model_type)
    return load(family.config_reference).from_variant(TINY, **overrides)


def main_auto_class(family: Family) -> str:
    """The Auto class of the family's main model: one with a head, if there is any."""
    return next((name for name in family.models if name not in ("AutoModel", "AutoBackbone")), "AutoModel")


def tiny_model(family: Family, auto_class: str | None = None):
    """A model with random weights, in eval mode.

    Args:
        family: the family.
        auto_class: which of its models; the one with a head if not given.
    """
    model_class = load(family.model_reference(auto_class or main_auto_class(family)))
    return model_class(tiny_config(family.model_type)).eval()
