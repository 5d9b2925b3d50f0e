# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the models with deconstructed attention."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import FACTOR, SIZE


#: kinds of mixers whose maps come from a constant sequence
STATIC_KINDS = ("rnd_emb_qk", "fixed_seq_qk")
#: kinds of mixers other than standard attention
SIMPLE_KINDS = ("mlp", "taylor_joint", "taylor_per_order", "non_approximate", *STATIC_KINDS, "static_emb_qk")
LAYER_KINDS = ("standard", *SIMPLE_KINDS)
#: the paper's name for the Taylor form, which is ambiguous there
_ALIASES = {"approximate": "taylor_joint"}


def _standard_layers(placement: str, num_layers: int) -> set[int]:
    """The standard layers, counted from 1, of a placement; the paper's for 24 layers in proportion."""
    layers = range(1, num_layers + 1)
    half, quarter = num_layers // 2, num_layers // 4
    chosen = {
        "uniform": (),
        "hybrid": layers[1::2],
        "odd": layers[::2],
        "top": layers[:half],
        "middle": (*layers[:quarter], *layers[num_layers - quarter :]),
        "bottom": layers[half:],
        "quarter": layers[3::4],
        "first": layers[:1],
        "last": layers[-1:],
        "bilateral": (*layers[:1], *layers[-1:]),
    }
    return set(chosen[placement])


_TIED = {"tie_word_embeddings": True}


@strict
class DeconstructedConfig(DecoderConfig):
    r"""Configuration of a [`DeconstructedForCausalLM`]: a Qwen2-like decoder whose layers mix tokens in different ways.

    Args:
        layer_kinds (`list[str]`, *optional*): for each layer `standard`, `mlp`, `taylor_joint` (also called `approximate`),
            `taylor_per_order`, `non_approximate`, `rnd_emb_qk`, `fixed_seq_qk` or `static_emb_qk`. From `placement` and
            `simple_kind` if not given.
        placement (`str`, *optional*): which layers keep standard attention; all if not given. Counted from 1: none
            (`uniform`), even ones (`hybrid`), odd ones (`odd`), the first half (`top`), the first and last quarter
            (`middle`), the second half (`bottom`), every fourth (`quarter`), the `first`, the `last`, or both (`bilateral`).
        simple_kind (`str`): kind of the other layers.
        static_length (`int`): longest sequence of a model with `rnd_emb_qk` or `fixed_seq_qk`, the length of its constant
            sequence.
        static_std (`float`): standard deviation of the constant embeddings of `rnd_emb_qk`.
        static_norm (`bool`): whether what queries and keys are computed from in `rnd_emb_qk`, `fixed_seq_qk` and
            `static_emb_qk` passes the input norm of the layer first.
        static_gradient (`bool`): whether gradients flow through the constant sequence into earlier layers.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "deconstructing_attention"
    variants = {
        "70m": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            **_TIED,
        },
        "160m": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            **_TIED,
        },
        "500m": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            **_TIED,
        },
        "1.7b": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "attention_bias": False,
            "qk_norm": True,
            **_TIED,
        },
    }
    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "static_length": 64,
        "layer_kinds": ["taylor_joint", "standard"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    ranges = {"static_length": SIZE, "static_std": FACTOR}

    vocab_size: int = 50304
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    max_position_embeddings: int = 2048
    attention_bias: bool = True
    attention_output_bias: bool | None = False
    layer_kinds: list[str] | tuple[str, ...] | None = None
    placement: (
        Literal["uniform", "hybrid", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral"] | None
    ) = None
    simple_kind: str = "taylor_joint"
    static_length: int = 2048
    static_std: float | int = 0.02
    static_norm: bool = True
    static_gradient: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.simple_kind = _ALIASES.get(self.simple_kind, self.simple_kind)
        if self.simple_kind not in SIMPLE_KINDS:
            raise ValueError(f"simple_kind must be one of {', '.join(SIMPLE_KINDS)}, got {self.simple_kind!r}.")
        standard = set(range(1, self.num_hidden_layers + 1))
        if self.placement is not None:
            standard = _standard_layers(self.placement, self.num_hidden_layers)
        placed = [
            "standard" if layer in standard else self.simple_kind for layer in range(1, self.num_hidden_layers + 1)
        ]
        if self.layer_kinds is None:
            self.layer_kinds = placed
        self.layer_kinds = [_ALIASES.get(kind, kind) for kind in self.layer_kinds]
        if self.placement is not None and self.layer_kinds != placed:
            raise ValueError(
                f"layer_kinds={self.layer_kinds} contradicts placement={self.placement!r} with "
                f"simple_kind={self.simple_kind!r}; pass either layer_kinds or placement."
            )
        super().__post_init__(**kwargs)

    @property
    def static_kinds(self) -> tuple[str, ...]:
        """The kinds of constant sequences that the model has."""
        return tuple(kind for kind in STATIC_KINDS if kind in self.layer_kinds)

    def validate_layer_kinds(self):
        """Part of the validation that `@strict` runs."""
        unknown = sorted(set(self.layer_kinds) - set(LAYER_KINDS))
        if unknown:
            raise ValueError(
                f"layer_kinds has the unknown kinds {', '.join(map(repr, unknown))}; available: "
                f"{', '.join(LAYER_KINDS)}."
            )
        if len(self.layer_kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layer_kinds must have one entry per layer ({self.num_hidden_layers}), got "
                f"{len(self.layer_kinds)}: {self.layer_kinds}."
            )
        if self.static_kinds and self.attention_dropout:
            raise ValueError(
                f"attention_dropout must be 0 with {', '.join(self.static_kinds)}, got {self.attention_dropout}, "
                "because the maps must be deterministic."
            )
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                "The mixers do not support sliding windows: all layer_types must be 'full_attention', got "
                f"{self.layer_types} with sliding_window={self.sliding_window}."
            )


__all__ = ["DeconstructedConfig"]
