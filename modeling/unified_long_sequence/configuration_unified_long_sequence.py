# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of models with a token mixer by name."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import COUNT, SIZE
from hf_attn.mixers import MIXERS, causal_mixers


@strict
class TokenMixerConfig(DecoderConfig):
    r"""Configuration of [`TokenMixerForCausalLM`] and [`TokenMixerForSequenceClassification`].

    Args:
        mixer (`str`): name of the token mixer in every layer, see [`~hf_attn.mixers.TokenMixer`].
        causal (`bool`): a token attends only to itself and earlier tokens; language models need it, and five of the mixers have no
            such form.
        max_position_embeddings (`int`): longest sequence, in tokens. Positions are learned and added to the embeddings.
        mixer_rank (`int`): rows that `linformer` projects the tokens to, and features of `performer`.
        num_landmarks (`int`): landmarks of `nystrom_pinv`.
        mixer_window (`int`): number of tokens on either side for `window` and `pooling`.
        mixing_size (`int`, *optional*): hidden tokens of `mlp_mixer`, `2 * max_position_embeddings` if not given.
        pseudo_inverse (`str`): `"exact"` or `"iterative"`, for `nystrom_pinv`.

    A mixer has one head, so that `num_attention_heads` is 1; `head_dim` is the width of its queries, keys and values, and
    `hidden_size` if not given. The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "token_mixer"
    #: the projections of a mixer are not those of a Llama
    base_model_tp_plan = None
    ranges: ClassVar = {"mixer_rank": SIZE, "num_landmarks": SIZE, "mixer_window": COUNT, "mixing_size": SIZE}
    tiny: ClassVar = {
        "vocab_size": 99,
        "pad_token_id": 0,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "mixer_rank": 8,
        "num_landmarks": 4,
        "mixer_window": 3,
    }

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 683
    num_hidden_layers: int = 4
    num_attention_heads: int = 1
    max_position_embeddings: int = 1024
    mixer: str = "softmax"
    causal: bool = True
    mixer_rank: int = 32
    num_landmarks: int = 32
    mixer_window: int = 16
    mixing_size: int | None = None
    pseudo_inverse: Literal["exact", "iterative"] = "exact"

    def __post_init__(self, **kwargs):
        if not self.causal:
            self.use_cache = False
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        if self.mixer not in MIXERS:
            raise ValueError(f"There is no token mixer {self.mixer!r}. Mixers: {', '.join(MIXERS)}.")
        if self.causal and self.mixer not in causal_mixers():
            raise ValueError(
                f"The mixer {self.mixer!r} has no causal form; use a classifier with causal=False. Causal mixers: "
                f"{', '.join(causal_mixers())}."
            )
        if self.num_attention_heads != 1:
            raise ValueError(f"A token mixer has one head, got num_attention_heads={self.num_attention_heads}.")
        if not self.causal and self.use_cache:
            raise ValueError("use_cache=True needs causal=True: otherwise every output depends on later tokens.")
        if self.mixer == "spatial_gating" and self.hidden_size % 2 != 0:
            raise ValueError(
                f"spatial_gating splits the channels into halves, so hidden_size must be even, got {self.hidden_size}."
            )


__all__ = ["TokenMixerConfig"]
