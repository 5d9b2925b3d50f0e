"""Ranges of the fields of configurations: declared as data, checked whenever a field is set.

`@strict` checks the type of a field by itself. A range becomes one more of its validators, so that a value that makes no
sense is refused at once, by the name of its field, instead of failing somewhere in a model or not at all.
"""

import math
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar


@dataclass(frozen=True)
class Range:
    """Numbers that a field may have. NaN and infinity are in no range, `None` in each if the type of the field allows it.

    Every entry of a list and every value of a dictionary is checked; other types are checked by the type of the field.

    Attributes:
        at_least, above, at_most, below: limits; `above` and `below` are exclusive.
        also: numbers with a meaning of their own that are allowed besides.
        length: number of entries that a list must have.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    length: int | None = None

    def __contains__(self, value: float) -> bool:
        return value in self.also or (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = [
            f"{word} {limit}"
            for word, limit in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if limit is not None
        ]
        also = "".join(f", or {value}" for value in self.also)
        return (" and ".join(limits) or "a finite number") + also

    def check(self, name: str, value: Any) -> None:
        """Raise `ValueError` with the name, the value and the range if a value is out of range."""
        entries = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list | tuple):
            if self.length is not None and len(value) != self.length:
                raise ValueError(f"{name} must have {self.length} entries, got {value}.")
            outside = [entry for entry in entries if _is_number(entry) and entry not in self]
            if outside:
                raise ValueError(f"{name}={value} is out of range: each entry must be {self}, got {outside[0]}.")
        elif _is_number(value) and value not in self:
            raise ValueError(f"{name}={value} is out of range: it must be {self}.")


class Activation:
    """Names of activation functions that transformers knows."""

    def check(self, name: str, value: Any) -> None:
        """Raise `ValueError` with the name, the value and the known names for any other."""
        from transformers.activations import ACT2FN

        if isinstance(value, str) and value not in ACT2FN:
            raise ValueError(
                f"{name}={value!r} is not an activation function. Available: {', '.join(sorted(ACT2FN))}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SIZE = Range(at_least=1)
COUNT = Range(at_least=0)
FACTOR = Range(at_least=0)
POSITIVE = Range(above=0)
RATE = Range(at_least=0, below=1)
FINITE = Range()
PAIR = Range(at_least=1, length=2)
#: -1 means "none" in some configurations on the Hub
TOKEN = Range(at_least=0, also=(-1,))

#: range of the fields of this name in all families
COMMON_RANGES: dict[str, Range | Activation] = {
    **dict.fromkeys(
        (
            "depths",
            "embed_dim",
            "encoder_stride",
            "head_dim",
            "hidden_size",
            "hidden_sizes",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_channels",
            "num_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "pooler_output_size",
            "pretraining_tp",
            "sliding_window",
            "vocab_size",
            "window_size",
        ),
        SIZE,
    ),
    **dict.fromkeys(("image_size", "patch_size"), PAIR),
    **dict.fromkeys(
        ("attention_dropout", "attention_probs_dropout_prob", "drop_path_rate", "dropout", "hidden_dropout_prob"), RATE
    ),
    **dict.fromkeys(
        ("batch_norm_eps", "final_norm_eps", "group_norm_eps", "layer_norm_eps", "norm_eps", "rms_norm_eps"), POSITIVE
    ),
    **dict.fromkeys(("mlp_ratio", "mlp_ratios", "qk_scale"), POSITIVE),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN),
    **dict.fromkeys(("hidden_act", "pooler_act"), Activation()),
    "chunk_size_feed_forward": COUNT,
    "initializer_range": FACTOR,
    "layer_scale_init_value": FINITE,
}


class RangesMixin:
    """Gives a configuration class ranges for its fields; part of [`~hf_attn.architectures.variants.VariantsMixin`].

    A family declares those of fields that no other family has, or that mean something else there:

        ranges = {"compress_ratio": SIZE, "conv_scale": FINITE}
    """

    #: field -> range, beside [`COMMON_RANGES`] and the ranges of the classes that a class derives from
    ranges: ClassVar[dict[str, Range | Activation]] = {}

    def __init_subclass__(cls, **kwargs):
        # This makes it a dataclass, whose validators `@strict` then collects.
        super().__init_subclass__(**kwargs)
        fields = vars(cls).get("__dataclass_fields__", {})
        for name, permitted in cls.all_ranges().items():
            if name in fields:
                fields[name] = _with_validator(fields[name], permitted)

    @classmethod
    def all_ranges(cls) -> dict[str, Range | Activation]:
        """The range of each field that has one, by name; of the common names also those that are not fields of the class."""
        ranges = dict(COMMON_RANGES)
        for parent in reversed(cls.__mro__):
            ranges.update(vars(parent).get("ranges", {}))
        return ranges

    def __post_init__(self, **kwargs):
        num_labels = kwargs.get("num_labels")
        if num_labels is not None:
            COUNT.check("num_labels", num_labels)
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Part of the validation that `@strict` runs."""
        width, heads, groups, head_dim = (
            getattr(self, name, None)
            for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups != 0:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}).")
        if (
            isinstance(heads, int)
            and isinstance(width, int)
            and width % heads != 0
            and head_dim in (None, width // heads)
        ):
            raise ValueError(f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}).")


class _Check:
    """Validator of one field, known as ours so that a subclass can declare another range."""

    def __init__(self, name: str, permitted: Range | Activation):
        self.name, self.permitted = name, permitted

    def __call__(self, value: Any) -> None:
        self.permitted.check(self.name, value)


def _with_validator(field, permitted: Range | Activation):
    others = field.metadata.get("validator") or []
    others = [check for check in (others if isinstance(others, list) else [others]) if not isinstance(check, _Check)]
    # A copy: the field may be that of a class of transformers.
    field = copy(field)
    field.metadata = MappingProxyType({**field.metadata, "validator": [_Check(field.name, permitted), *others]})
    return field
