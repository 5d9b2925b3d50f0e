"""Ranges of the fields of every configuration in the catalogue."""

import dataclasses
import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_attn.architectures.ranges import Activation, Range
from hf_attn.architectures.variants import TINY
from hf_attn.catalog import families
from hf_attn.registration import load
from tests.batteries.families import tiny_config


FAMILIES = [family.model_type for family in families()]


def numeric_fields(config_class: type) -> dict[str, dataclasses.Field]:
    """Fields of numbers, or of lists or dictionaries of numbers; labels are names."""
    return {
        field.name: field
        for field in dataclasses.fields(config_class)
        if field.name not in ("id2label", "label2id") and re.search(r"\b(int|float)\b", str(field.type))
    }


def bad_values(permitted: Range, takes_floats: bool) -> list[float]:
    """Numbers outside of a range: just beyond its limits, far away, and not a number."""
    values = [math.nan, math.inf, -math.inf] if takes_floats else []
    if permitted.at_least is not None:
        values += [permitted.at_least - 1, -(10**9)]
    if permitted.above is not None:
        values += [permitted.above, -(10**9)]
    if permitted.below is not None:
        values += [permitted.below, 10**9]
    if permitted.at_most is not None:
        values += [permitted.at_most + 1, 10**9]
    return [value for value in values if value not in permitted.also]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_numeric_field_refuses_what_is_out_of_its_range(model_type):
    config_class = type(tiny_config(model_type))
    ranges = config_class.all_ranges()
    for name, field in numeric_fields(config_class).items():
        assert name in ranges, f"Declare a range for {config_class.__name__}.{name} (see architectures/ranges.py)."
        takes_floats = "float" in str(field.type)
        values = bad_values(ranges[name], takes_floats)
        assert values, f"{config_class.__name__}.{name} takes any integer."
        like = getattr(tiny_config(model_type), name)
        for value in values:
            if isinstance(like, list | tuple) or (like is None and str(field.type).startswith("list")):
                value = [*(like or ())[1:], value]
            elif isinstance(like, dict):
                value = {**like, next(iter(like)): value}
            elif field.type in (float, float | None) and isinstance(value, int):
                value = float(value)
            message = rf"{name}={re.escape(str(value))} is out of range: .*{re.escape(str(ranges[name]))}"
            with pytest.raises(StrictDataclassError, match=message):
                tiny_config(model_type, **{name: value})
            config = tiny_config(model_type)
            with pytest.raises(StrictDataclassError, match=name):
                setattr(config, name, value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_configuration_refuses_names_that_are_no_activations(model_type):
    ranges = type(tiny_config(model_type)).all_ranges()
    names = [field.name for field in dataclasses.fields(tiny_config(model_type)) if "act" in field.name.split("_")]
    for name in names:
        assert isinstance(ranges.get(name), Activation), f"{name} is an activation without a check."
        with pytest.raises(
            StrictDataclassError, match=rf"{name}='guelph' is not an activation function\. Available: .*gelu"
        ):
            tiny_config(model_type, **{name: "guelph"})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_configuration_has_a_negative_number_of_labels(model_type):
    with pytest.raises(ValueError, match=r"num_labels=-2 is out of range: it must be at least 0"):
        tiny_config(model_type, num_labels=-2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_heads_that_do_not_divide_are_refused(model_type):
    config = tiny_config(model_type)
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        pytest.skip("heads of stages or none: a test of the family looks at them")
    names = {"hidden_size", "num_key_value_heads"} & set(type(config).__dataclass_fields__)
    if "head_dim" in type(config).tiny:
        names.discard("hidden_size")  # The head dimension is set independently.
    for name in names:
        value = getattr(config, name) + 1
        with pytest.raises((StrictDataclassError, ValueError), match=rf"\b{value}\b"):
            tiny_config(model_type, **{name: value})


@pytest.mark.parametrize("family", families(), ids=FAMILIES)
def test_the_tiny_variant_is_not_published(family):
    config_class = load(family.config_reference)
    assert TINY not in config_class.variants
    assert config_class.from_variant(TINY, num_labels=3).num_labels == 3
    with pytest.raises(ValueError, match=r"imaginary.*tiny"):
        config_class.from_variant("imaginary")


def test_limits():
    rate = Range(at_least=0, below=1)
    assert 0 in rate and 0.5 in rate
    assert not any(value in rate for value in (1, -0.1, math.nan, math.inf))
    assert str(rate) == "at least 0 and below 1"
    grid = Range(at_least=1, also=(-1,))
    assert -1 in grid and 0 not in grid and str(grid) == "at least 1, or -1"
    assert 1e300 in Range() and math.nan not in Range() and str(Range()) == "a finite number"


def test_numbers_in_lists_and_dictionaries_and_lengths():
    pair = Range(at_least=1, length=2)
    pair.check("image_size", 7)
    pair.check("image_size", [7, 9])
    pair.check("image_size", None)
    with pytest.raises(ValueError, match=r"image_size must have 2 entries, got \[7\]"):
        pair.check("image_size", [7])
    with pytest.raises(ValueError, match=r"image_size=\[7, 0\] is out of range: each entry must be at least 1, got 0"):
        pair.check("image_size", [7, 0])
    with pytest.raises(ValueError, match="each entry must be at most 1, got 2"):
        Range(at_most=1).check("thresholds", {"default": 2})


def test_ranges_leave_the_classes_of_transformers_alone():
    from transformers import LlamaConfig, ViTConfig

    assert LlamaConfig(attention_dropout=1.0).attention_dropout == 1.0
    assert ViTConfig(hidden_dropout_prob=1.0).hidden_dropout_prob == 1.0
