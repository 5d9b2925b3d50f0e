"""Entries of a comparison: models of the same size, created from their names."""

import json
from dataclasses import asdict, dataclass

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from ..catalog import Family, families
from ..registration import load


BASELINE = "llama"


@dataclass(frozen=True)
class Shape:
    """The sizes that all models share.

    Attributes:
        vocab_size: number of tokens; the last one is reserved for mechanisms that need a token of their own.
        max_position_embeddings: length of the longest sequence in the evaluation.
    """

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    tie_word_embeddings: bool = True


def default_entries() -> list[str]:
    """A plain Llama, and every family of the catalogue that is compared by default."""
    return [BASELINE, *(family.model_type for family in families() if family.compares is not None)]


def _family(name: str) -> Family:
    known = {family.model_type: family for family in families() if family.compares is not None}
    if name not in known:
        raise ValueError(
            f"There is no entry {name!r}. Families: {', '.join([BASELINE, *known])}; append fields of the "
            "configuration after a colon ('echo_att:shared_layers=[1,2]'), and an attention function after a plus "
            "sign ('llama+sigmoid')."
        )
    return known[name]


def _fields(text: str) -> dict[str, object]:
    fields = {}
    for part in filter(None, text.split(";")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"{part!r} does not set a field: write NAME=VALUE, and separate several fields by semicolons."
            )
        try:
            fields[name.strip()] = json.loads(value)
        except ValueError:
            fields[name.strip()] = value.strip()
    return fields


def make_config(entry: str, shape: Shape) -> tuple[PreTrainedConfig, str | None]:
    """The configuration of an entry, and the attention function that it names.

    Args:
        entry: `llama` or a model type of the catalogue, then optionally `+NAME` (an attention function), then optionally
            `:FIELD=VALUE;...` (fields of the configuration, with JSON values).
        shape: the common sizes; those that are fields of the configuration are set.

    Raises:
        ValueError: for an unknown family, an unknown field, or an invalid value.
    """
    name, _, given = entry.partition(":")
    name, _, attention = name.partition("+")
    fields = _fields(given)
    if name == BASELINE:
        config_class = LlamaConfig
    else:
        family = _family(name)
        config_class, fields = load(family.config_reference), {**family.compares, **fields}
    known = config_class.__dataclass_fields__
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{entry!r}: {config_class.__name__} has no field {', '.join(unknown)}.")
    common = {field: value for field, value in asdict(shape).items() if field in known}
    if "landmark_token_id" in known:
        common["landmark_token_id"] = shape.vocab_size - 1
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return config_class(**{**common, **special, **fields}), attention or None


def make_model(entry: str, shape: Shape) -> PreTrainedModel:
    """The model of an entry with random weights; see [`make_config`]."""
    config, attention = make_config(entry, shape)
    return AutoModelForCausalLM.from_config(config, **({"attn_implementation": attention} if attention else {}))
