# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the EchoAtt models."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import COUNT, SIZE


_TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


@strict
class EchoAttConfig(DecoderConfig):
    r"""Configuration of an [`EchoAttForCausalLM`]: a Llama-like model in which some layers reuse another layer's attention
    map.

    Args:
        shared_layers (`list[int]`): layers (counted from 0) that have no query and key projections of their own.
        shared_source (`list[int]`, *optional*): for each entry of `shared_layers` the layer whose map it uses; the nearest
            earlier layer that has a map of its own if not given.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "echo_att"
    # The paper prints eight of the nine layers of the 41% model; the ninth, 8, follows from its list for 77% and from the
    # number of parameters.
    variants = {
        "tinyllama_23": {**_TINYLLAMA, "shared_layers": [2, 3, 4, 5, 7]},
        "tinyllama_41": {**_TINYLLAMA, "shared_layers": [2, 3, 4, 5, 6, 7, 8, 9, 18]},
        "tinyllama_77": {**_TINYLLAMA, "shared_layers": [*range(1, 15), 16, 17, 18]},
    }

    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "shared_layers": [1, 3],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ranges = {"shared_layers": SIZE, "shared_source": COUNT}

    shared_layers: list[int] | tuple[int, ...] = field(default_factory=list)
    shared_source: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs):
        self.shared_layers = list(self.shared_layers)
        if self.shared_source is None and self._shared_layers_in_range():
            self.shared_source = [self._nearest_source(layer) for layer in self.shared_layers]
        super().__post_init__(**kwargs)

    def _shared_layers_in_range(self) -> bool:
        return all(0 < layer < self.num_hidden_layers for layer in self.shared_layers)

    def _nearest_source(self, layer: int) -> int:
        return max(source for source in range(layer) if source not in self.shared_layers)

    @property
    def attention_source(self) -> dict[int, int]:
        """Shared layer -> layer whose attention map it uses."""
        return dict(zip(self.shared_layers, self.shared_source or (), strict=True))

    def validate_shared_layers(self):
        """Part of the validation that `@strict` runs."""
        if not self._shared_layers_in_range():
            raise ValueError(
                f"shared_layers must contain layers between 1 and {self.num_hidden_layers - 1} (layer 0 has no "
                f"earlier layer to share with), got {self.shared_layers}."
            )
        if len(set(self.shared_layers)) != len(self.shared_layers):
            raise ValueError(f"shared_layers must not repeat a layer, got {self.shared_layers}.")
        if self.shared_source is None or len(self.shared_source) != len(self.shared_layers):
            raise ValueError(
                f"shared_source must have one entry per shared layer ({len(self.shared_layers)}), got "
                f"{self.shared_source}."
            )
        for layer, source in self.attention_source.items():
            if not 0 <= source < layer:
                raise ValueError(
                    f"Layer {layer} cannot share with layer {source}: the source must be an earlier layer."
                )
            if source in self.shared_layers:
                raise ValueError(
                    f"Layer {layer} cannot share with layer {source}, which has no attention of its own. Name the layer "
                    f"that layer {source} shares with, {self.attention_source[source]}."
                )
            if self.layer_types[layer] != self.layer_types[source]:
                raise ValueError(
                    f"Layer {layer} ({self.layer_types[layer]}) cannot share with layer {source} "
                    f"({self.layer_types[source]}): their masks differ."
                )


__all__ = ["EchoAttConfig"]
