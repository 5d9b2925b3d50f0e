# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of DeBERTa with its enhanced mask decoder."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import DebertaV2Config

from hf_attn.architectures.ranges import COUNT, RATE, SIZE, Activation, Range
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


_V1 = {
    "vocab_size": 50265,
    "position_buckets": -1,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "max_relative_positions": -1,
}
_XLARGE_V2 = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@strict
class DebertaEMDConfig(HubConfigMixin, VariantsMixin, DebertaV2Config):
    r"""Configuration of a [`DebertaEMDForMaskedLM`], for weights of DeBERTa v1, v2 and v3; the defaults are v3-base.

    Args:
        position_buckets (`int`): half the number of buckets of relative positions; not positive for one row for each
            distance below `max_relative_positions`.
        share_att_key (`bool`): project relative positions by the content's maps, not by maps of their own.
        norm_rel_ebd (`str`): `"layer_norm"` normalises the table of relative positions.
        conv_kernel_size (`int`): size of the convolution after the first layer; 0 for none.
        conv_act (`str`): its activation.
        conv_groups (`int`): its groups.
        embedding_size (`int`, *optional*): width of the word embeddings; `hidden_size` if not given, which the mask decoder
            needs unless `position_biased_input`.
        position_biased_input (`bool`): add absolute positions to the input; the enhanced mask decoder, which adds them before
            the last layer, is not used then.

    The other arguments are those of [`~transformers.DebertaV2Config`].
    """

    model_type = "deberta_emd"
    # A training step has logits of masked positions only, as many as there happen to be.
    keys_to_ignore_at_inference = ["logits"]
    variants = {
        "base": _V1,
        "large": {**_V1, **_LARGE},
        "xlarge": {**_V1, **_LARGE, "num_hidden_layers": 48},
        "v2-xlarge": _XLARGE_V2,
        "v2-xxlarge": {**_XLARGE_V2, "num_hidden_layers": 48},
        "v3-xsmall": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        "v3-small": {"num_hidden_layers": 6},
        "v3-base": {},
        "v3-large": _LARGE,
        "mdeberta-v3-base": {"vocab_size": 251000},
    }
    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "position_buckets": 8,
    }
    ranges = {
        "type_vocab_size": COUNT,
        "max_relative_positions": Range(at_least=-1),
        "position_buckets": Range(at_least=-1),
        "pooler_dropout": RATE,
        "conv_kernel_size": COUNT,
        "conv_groups": SIZE,
        "embedding_size": SIZE,
        "pooler_hidden_act": Activation(),
        "conv_act": Activation(),
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    relative_attention: bool = True
    position_biased_input: bool = False
    pos_att_type: str | list[str] | None = "p2c|c2p"
    legacy: bool = False
    position_buckets: int = 256
    share_att_key: bool = True
    norm_rel_ebd: Literal["none", "layer_norm"] = "layer_norm"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    embedding_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)
        unknown = sorted(set(self.pos_att_type or ()) - {"c2p", "p2c"})
        if unknown:
            raise ValueError(f"pos_att_type has the unknown terms {', '.join(unknown)}; available: c2p and p2c.")


__all__ = ["DebertaEMDConfig"]
