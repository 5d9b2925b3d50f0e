"""A decoder whose mixers, feed-forward blocks and positions families replace.

It is transformers' Llama, written so that its parts can be exchanged, and honours what transformers' decoders honour:
dynamic, static, quantised and offloaded caches, chunked prefill, early exit (`config.num_hidden_layers` below the number of
layers), `logits_to_keep`, gradient checkpointing, recording of outputs, tied embeddings, padding, packed sequences. A family
is a configuration, a mixer, and a few class attributes:

    @strict
    class ToyConfig(DecoderConfig):
        model_type = "toy"
        mixer_types: list[str] | None = None

    class RunningMean(Mixer):                       # keeps a state of constant size
        cache_kind, mask_kind = StateLayer, "padding"

        def __init__(self, config, layer_idx): ...

        @takes_cache
        def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
            state = None if cache is None else cache.layers[self.layer_idx]
            ...                                     # reads and assigns state.states[name]
            return output, None

    class ToyLayer(DecoderLayer):
        def make_mixer(self, config, layer_idx):
            mixers = {"attention": DecoderAttention, "mean": RunningMean}
            return mixers[config.mixer_types[layer_idx]](config, layer_idx)

    class ToyPreTrainedModel(DecoderPreTrainedModel):
        config: ToyConfig
        layer_class = ToyLayer

    class ToyModel(ToyPreTrainedModel, DecoderModel): ...

    class ToyForCausalLM(FromLlamaMixin, ToyPreTrainedModel, DecoderForCausalLM):
        model_class = ToyModel

    class ToyForSequenceClassification(GenericForSequenceClassification, ToyPreTrainedModel): ...

What can be replaced:

- `DecoderLayer.make_mixer`, `make_mlp`, `make_norm`; `forward` for another order of norms and branches.
- `DecoderAttention.queries_and_keys`, `values`, `attend`, `output`, `eager_attention_forward`;
  made with `has_queries_and_keys=False` the mixer has values only (`cached_values`).
- `Mixer.cache_kind`: `None` for keys and values, `ValueLayer`, `StateLayer`, or a subclass with `in_place_of`.
- `Mixer.mask_kind`: a mask of pairs, or `"padding"`, see [`Mixer`].
- `DecoderModel.make_embedding`, `make_norm`, `make_rotary_embedding` (`None`: no rotary embedding), `embed_positions` (what
  is added to the embeddings), `layer_arguments` (what all layers share), `mask_arguments`, `mask_functions`, `run_layers`.
- `_init_weights` on the family's `PreTrainedModel`. A family whose attention is not softmax also takes `OwnAttentionMixin`
  there, before `DecoderPreTrainedModel`.
- `FromLlamaMixin.dropped_from_base`, `new_to_base`, `state_from_base`, `takes_sliding_windows`.

In transformers 5.24 the cache is called `cache` and before `past_key_values`. Methods that take one are written with the new
name and `@takes_cache`; a model that passes one to transformers or to layers writes `**{CACHE: cache}`.
"""

from .bases import BASES, FromLlamaMixin
from .cache import CACHE, StateLayer, ValueLayer, adopt_cache, cache_values, takes_cache
from .configuration import DecoderConfig, EncoderConfig
from .layers import DecoderAttention, DecoderLayer, Mixer, PlainMLP, make_norm
from .modeling import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel


__all__ = [
    "BASES",
    "CACHE",
    "DecoderAttention",
    "DecoderConfig",
    "DecoderForCausalLM",
    "DecoderLayer",
    "DecoderModel",
    "DecoderPreTrainedModel",
    "EncoderConfig",
    "FromLlamaMixin",
    "Mixer",
    "PlainMLP",
    "StateLayer",
    "ValueLayer",
    "adopt_cache",
    "cache_values",
    "make_norm",
    "takes_cache",
]
