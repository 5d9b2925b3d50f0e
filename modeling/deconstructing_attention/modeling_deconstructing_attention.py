# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Deconstructed attention (arXiv 2510.11602): a decoder in which attention gives up one principle after the other.

    standard           A = softmax(Q K^T / sqrt(d)),  output A V
    mlp                no mixing of tokens
    taylor_joint       exp(s) becomes 1 + s + s^2 / 2
    taylor_per_order   the orders of that expansion with a sum of their own each
    non_approximate    the score of a token is that of its own query and key
    rnd_emb_qk         Q and K of constant random embeddings that run through the same layers
    fixed_seq_qk       Q and K of a constant text that runs through the same layers
    static_emb_qk      Q and K of the embeddings of the tokens

All have as many parameters as attention and can be mixed. A constant sequence passes through all layers in addition to the input, with
the same weights, up to the last one that needs its map.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from hf_attn.architectures.decoder import (
    CACHE,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
    takes_cache,
)

from .configuration_deconstructing_attention import STATIC_KINDS, DeconstructedConfig
from .mixers import MIXERS, Mixer
from .static_maps import StaticInput, StaticMap


#: by how much more than is needed, at least, decoding lets the maps of a cache grow
_GROWTH = 64


class DeconstructedLayer(DecoderLayer):
    """A pre-norm layer with one of the mixers, for the input and for the constant sequences."""

    def __init__(self, config: DeconstructedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kind = config.layer_kinds[layer_idx]
        self.source_norm = config.static_norm
        self.static_gradient = config.static_gradient

    def make_mixer(self, config: DeconstructedConfig, layer_idx: int) -> Mixer:
        return MIXERS[config.layer_kinds[layer_idx]](config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_embeddings: torch.Tensor,
        *static_states: torch.Tensor,
        static_arguments: dict[str, dict] | None = None,
        static_map: StaticMap | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            token_embeddings: input of the first layer.
            static_states: for each constant sequence that still runs its hidden states and the embeddings that it began
                with, `(1, static length, hidden_size)`.
            static_arguments: kind of each of these sequences -> arguments of the mixer for it.
            static_map: map of the layer from an earlier forward; it is not computed again.
            kwargs: arguments of the mixer.

        Returns:
            The hidden states of the input, then of the constant sequences.
        """
        static_arguments = static_arguments or {}
        sequences = dict(zip(static_arguments, zip(static_states[::2], static_states[1::2], strict=True), strict=True))
        if self.kind in sequences:
            static_map = self.self_attn.static_map(
                self.source(sequences[self.kind][0]), static_arguments[self.kind]["position_embeddings"]
            )
            cache = kwargs.get(CACHE)
            if cache is not None:
                cache.layers[self.self_attn.layer_idx].static_map = static_map
        elif static_map is not None:
            static_map.to(hidden_states.device)
        results = [self.block(self.self_attn, hidden_states, token_embeddings, static_map, kwargs)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.static_gradient):
            for kind, (states, embeddings) in sequences.items():
                # Not through __call__: outputs are recorded there, and these are none of the model's.
                results.append(
                    self.block(self.self_attn.forward, states, embeddings, static_map, static_arguments[kind])
                )
        return tuple(results)

    def source(self, states: torch.Tensor) -> torch.Tensor:
        """What queries and keys are computed from that are not those of the input's hidden states."""
        return self.input_layernorm(states) if self.source_norm else states

    def block(self, mixer, hidden_states, token_embeddings, static_map, arguments: dict) -> torch.Tensor:
        """The two branches for one of the sequences."""
        if self.kind == "static_emb_qk":
            arguments = {**arguments, "token_states": self.source(token_embeddings)}
        if self.kind in STATIC_KINDS:
            arguments = {**arguments, "static_map": static_map}
        mixed, _ = mixer(self.input_layernorm(hidden_states), **arguments)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeconstructedPreTrainedModel(DecoderPreTrainedModel):
    config: DeconstructedConfig
    layer_class = DeconstructedLayer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StaticInput):
            if hasattr(module, "embeds"):
                init.normal_(module.embeds, std=self.config.static_std)
            if hasattr(module, "ids"):
                init.copy_(module.ids, torch.randint(self.config.vocab_size, module.ids.shape))


class DeconstructedModel(DeconstructedPreTrainedModel, DecoderModel):
    """The decoder without a head."""

    def __init__(self, config: DeconstructedConfig):
        super().__init__(config)
        if config.static_kinds:
            self.static_input = StaticInput(config)
        self.post_init()

    def set_static_ids(self, input_ids: torch.Tensor | Sequence[int]) -> None:
        """Set the text of `fixed_seq_qk`, before training.

        Args:
            input_ids: `static_length` token ids; the paper takes the first of its training text.

        Raises:
            ValueError: for a model without this kind, another number of ids, or ids that are not in the vocabulary.
        """
        if "fixed_seq_qk" not in self.config.static_kinds:
            raise ValueError(f"No layer is 'fixed_seq_qk': layer_kinds is {self.config.layer_kinds}.")
        input_ids = torch.as_tensor(input_ids)
        ids = self.static_input.ids
        if input_ids.shape != ids.shape or input_ids.min() < 0 or input_ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"The constant sequence must be {len(ids)} token ids (static_length) below {self.config.vocab_size}, "
                f"got shape {tuple(input_ids.shape)} with values from {int(input_ids.min())} to "
                f"{int(input_ids.max())}."
            )
        ids.copy_(input_ids)

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Run the decoder; see [`~hf_attn.architectures.decoder.DecoderModel`].

        Args:
            position_ids: `(batch, length)`. In a model with constant sequences they say which row of a map a token has; if
                they are not given, padding is not counted there.
        """
        if self.config.static_kinds and torch.compiler.is_exporting():
            raise ValueError(
                f"Models with {', '.join(self.config.static_kinds)} cannot be exported: a graph cannot look up rows of their maps "
                "by the values of positions. Run the model in PyTorch."
            )
        if self.config.static_kinds and position_ids is None and _is_padded(attention_mask):
            inputs = kwargs.get("inputs_embeds") if input_ids is None else input_ids
            position_ids = _positions(attention_mask)[:, -inputs.shape[1] :]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )

    def make_masks(self, layers: nn.ModuleList, *, attention_mask, position_ids, **kwargs) -> dict:
        masks = super().make_masks(layers, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if not self.config.static_kinds:
            return masks
        cache, length = kwargs.get(CACHE), position_ids.shape[1]
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        key_positions = None
        if _is_padded(attention_mask):
            key_positions = _positions(attention_mask)
        elif past_length == 0:
            key_positions = position_ids
        counted = torch.arange(past_length, past_length + length, device=position_ids.device)
        if past_length > 0:
            expected = counted if key_positions is None else key_positions[:, -length:]
            if (position_ids != expected).any():
                raise ValueError(
                    f"With {', '.join(self.config.static_kinds)}, position_ids must continue those of the cache, "
                    f"counted without padding: expected {expected.tolist()}, got {position_ids.tolist()}."
                )
        is_counted = not _is_padded(attention_mask) and bool((position_ids == counted).all())
        masks["key_positions"] = None if is_counted else key_positions
        masks["is_whole"] = is_counted and (attention_mask is None or attention_mask.dim() == 2)
        return masks

    def run_layers(self, layers: nn.ModuleList, hidden_states: torch.Tensor, masks: dict, **kwargs) -> torch.Tensor:
        cache, token_embeddings = kwargs[CACHE], hidden_states
        last_use = {
            kind: max((index for index, layer in enumerate(layers) if layer.kind == kind), default=-1)
            for kind in self.config.static_kinds
        }
        sequences, arguments = self._static_sequences(layers, cache, kwargs["position_ids"])
        if last_use:
            kwargs |= {name: masks[name] for name in ("key_positions", "is_whole")}
        for index, layer in enumerate(layers):
            mask_kind = layer.self_attn.mask_kind
            running = [kind for kind in sequences if index <= last_use[kind]]
            static_arguments = {
                kind: {**arguments[kind], "attention_mask": arguments[kind]["masks"][mask_kind]} for kind in running
            }
            known = None
            if layer.kind in STATIC_KINDS and layer.kind not in sequences:
                known = cache.layers[layer.self_attn.layer_idx].static_map
            hidden_states, *static_states = layer(
                hidden_states,
                token_embeddings,
                *(states for kind in running for states in sequences[kind]),
                static_arguments=static_arguments,
                static_map=known,
                attention_mask=masks[mask_kind],
                **kwargs,
            )
            for kind, states in zip(running, static_states, strict=True):
                sequences[kind] = states, sequences[kind][1]
        return hidden_states

    def _static_sequences(
        self, layers: nn.ModuleList, cache: Cache | None, position_ids: torch.Tensor
    ) -> tuple[dict[str, tuple], dict[str, dict]]:
        """The constant sequences that have to run, each twice (hidden states and embeddings), and arguments for them; none
        if the cache has the maps."""
        mixers = [layer.self_attn for layer in layers if layer.kind in STATIC_KINDS]
        if not mixers:
            return {}, {}
        needed, limit = int(position_ids.max()) + 1, self.config.static_length
        if needed > limit:
            raise ValueError(
                f"The input has {needed} positions, but the maps of {', '.join(self.config.static_kinds)} cover only "
                f"static_length={limit}: shorten the input."
            )
        length = needed
        if cache is not None:
            kept = [getattr(cache.layers[mixer.layer_idx], "static_map", None) for mixer in mixers]
            is_new = int(cache.get_seq_length()) == 0
            if not is_new and all(kept_map is not None and kept_map.length >= needed for kept_map in kept):
                return {}, {}
            length = min(limit, needed + max(_GROWTH, needed // 2))
        sequences, arguments = {}, {}
        positions = torch.arange(length, device=position_ids.device)[None]
        for kind in dict.fromkeys(layer.kind for layer in layers if layer.kind in STATIC_KINDS):
            embeddings = self.static_input(kind, length)
            if kind == "fixed_seq_qk":
                embeddings = self.embed_tokens(embeddings)
            masks = super().make_masks(
                layers, attention_mask=None, inputs_embeds=embeddings, position_ids=positions, **{CACHE: None}
            )
            arguments[kind] = {
                "masks": masks,
                "position_embeddings": self.rotary_emb(embeddings, position_ids=positions),
                "position_ids": positions,
            }
            sequences[kind] = embeddings, embeddings
        return sequences, arguments


def _is_padded(attention_mask) -> bool:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and not bool(attention_mask.all())


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions of tokens, padding not counted, `(batch, length)`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class DeconstructedForCausalLM(FromLlamaMixin, DeconstructedPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head; `from_base` makes one from a Llama-like model."""

    model_class = DeconstructedModel
    takes_sliding_windows = False

    @classmethod
    def config_from_base(cls, base_config, **overrides) -> DeconstructedConfig:
        if {"placement", "simple_kind"} & overrides.keys():
            overrides = {"layer_kinds": None, **overrides}
        elif "layer_kinds" in overrides:
            overrides = {"placement": None, **overrides}
        return super().config_from_base(base_config, **overrides)

    @classmethod
    def dropped_from_base(cls, name: str, config: DeconstructedConfig) -> bool:
        parts = name.split(".")
        return (
            parts[:2] == ["model", "layers"]
            and parts[3:4] == ["self_attn"]
            and config.layer_kinds[int(parts[2])] == "mlp"
            and parts[4] in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
        )

    @classmethod
    def new_to_base(cls, name: str, config: DeconstructedConfig) -> bool:
        parts = name.split(".")
        if parts[:2] == ["model", "static_input"]:
            return True
        return (
            parts[3:4] == ["self_attn"]
            and config.layer_kinds[int(parts[2])] == "mlp"
            and parts[4] in ("gate_proj", "up_proj", "down_proj")
        )

    def without_simple_layers(self) -> "DeconstructedForCausalLM":
        """The model without its non-standard layers, attention and feed-forward block alike: the paper's `skip` evaluation.

        Returns:
            A model of the remaining layers, in eval mode. It shares their weights with this one.

        Raises:
            ValueError: if there is no standard layer.
        """
        kept = [index for index, kind in enumerate(self.config.layer_kinds) if kind == "standard"]
        if not kept:
            raise ValueError(f"No layer would be left: layer_kinds is {self.config.layer_kinds}.")
        config = type(self.config).from_dict(
            {
                **self.config.to_dict(),
                "num_hidden_layers": len(kept),
                "layer_types": None,
                "layer_kinds": ["standard"] * len(kept),
                "placement": None,
            }
        )
        config._attn_implementation = self.config._attn_implementation
        with torch.device("meta"):
            model = type(self)(config)
        model.model.layers = nn.ModuleList(
            [self._renumbered(self.model.layers[index], layer_idx, config) for layer_idx, index in enumerate(kept)]
        )
        for name in ("embed_tokens", "norm", "rotary_emb"):
            setattr(model.model, name, getattr(self.model, name))
        model.lm_head = self.lm_head
        model.generation_config = self.generation_config
        return model.eval()

    @staticmethod
    def _renumbered(layer: DeconstructedLayer, layer_idx: int, config: DeconstructedConfig) -> DeconstructedLayer:
        with torch.device("meta"):
            copy = DeconstructedLayer(config, layer_idx)
        copy.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
        return copy


__all__ = [
    "DeconstructedForCausalLM",
    "DeconstructedModel",
    "DeconstructedPreTrainedModel",
]
