"""Cache layers: keys and values, values only, a state of constant size, or nothing.

Caches are made by people who do not know the mixers of a model: `generate` makes dynamic, static, quantised and offloaded
ones from the configuration, PEFT fills one with a prefix. A mixer that keeps something else than keys and values names a
kind of layer (`cache_kind`), and [`adopt_cache`] puts it in the place of the layer that it finds.
"""

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import nn
from transformers.cache_utils import BaseQuantizedLayer, Cache, CacheLayerMixin, DummyLayer, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg


#: How the installed transformers calls the cache among the arguments of models and layers, and in outputs. Before 5.24 it
#: was `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def takes_cache(forward: Callable) -> Callable:
    """Decorates a method with an argument `cache` so that it takes the cache under its old name, `past_key_values`, too. Where
    transformers has the new name, the old one warns, as it does there.

    Raises:
        ValueError: in a call with both.
    """
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(forward)

    @wraps(forward)
    def with_either_name(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            if cache is not None:
                if kwargs.get("cache") is not None:
                    raise ValueError("`past_key_values` is the old name of `cache`; pass one of them.")
                kwargs["cache"] = cache
        return forward(self, *args, **kwargs)

    return with_either_name


class StateLayer(DummyLayer, CacheLayerMixin):
    """A cache layer without keys and values, for a state of constant size or for nothing.

    It counts as a dummy layer, so that masks are sized by the layers with keys, and knows the number of tokens seen, so that
    a model of such layers only has positions too.

    Attributes:
        states: tensors that the mixer caches, by name; the first dimension of each tensor is the batch. Empty before the
            first input, and always for a mixer that keeps nothing.
        seen_tokens: number of columns of the input so far, padding included. The model counts, after each forward.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.states: dict[str, torch.Tensor] = {}
        self.seen_tokens = 0

    @classmethod
    def in_place_of(cls, layer: CacheLayerMixin) -> "StateLayer":
        """A new layer for a mixer that found `layer` in the cache.

        Raises:
            ValueError: if the other layer holds tokens, whose keys and values say nothing to the mixer.
        """
        if int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"The cache contains keys and values of {int(layer.get_seq_length())} tokens in a layer whose mixer "
                "caches none. A cache that was filled by another model or with a learned prefix (prefix tuning) "
                "cannot be used here."
            )
        return cls()

    @property
    def is_croppable(self) -> bool:
        return not self.states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        self.states, self.seen_tokens = {}, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            ValueError: if there are states, which cannot be taken back.
        """
        if tokens_to_remove == 0:
            return
        if self.states:
            raise ValueError(
                "A layer with a state of constant size cannot remove single tokens, as assisted decoding requires: "
                "decode without an assistant."
            )
        self.seen_tokens = max(self.seen_tokens - abs(tokens_to_remove), 0)

    def _select(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda state: state[indices.to(state.device)])


class ValueLayer(DynamicLayer):
    """A growing cache layer of values. Its keys have no width, so that lengths, cropping and reordering work as usual."""

    def get_seq_length(self) -> int:
        return self.values.shape[-2] if self.is_initialized and self.values.numel() > 0 else 0

    @classmethod
    def in_place_of(cls, layer: CacheLayerMixin) -> CacheLayerMixin:
        """The layer for a mixer without keys that found `layer` in the cache: of the same kind, without keys. Values that it
        holds stay.

        Raises:
            ValueError: if the keys of the other layer are quantised already.
        """
        if type(layer) is DynamicLayer:
            values = cls()
            if layer.is_initialized:
                values.lazy_initialization(layer.keys, layer.values)
                values.keys, values.values = layer.values[..., :0], layer.values
            return values
        if isinstance(layer, BaseQuantizedLayer):
            if layer.is_initialized:
                raise ValueError(
                    "The cache contains quantised keys in a layer whose mixer has none: start with a new cache."
                )
            layer.__class__ = _without_quantised_keys(type(layer))
        elif layer.is_initialized:
            layer.keys = layer.keys[..., :0].clone()
            if isinstance(layer, StaticLayer):
                layer.k_head_dim = 0
        return layer


def _without_quantised_keys(layer_class: type[BaseQuantizedLayer]) -> type[BaseQuantizedLayer]:
    class QuantizedValueLayer(layer_class):
        """Keys without width are kept as they are."""

        def _quantize(self, tensor, *args, **kwargs):
            return super()._quantize(tensor, *args, **kwargs) if tensor.shape[-1] > 0 else (tensor, None)

        def _dequantize(self, quantized):
            is_key = isinstance(quantized, tuple) and quantized[0].shape[-1] == 0
            return quantized[0] if is_key else super()._dequantize(quantized)

    return QuantizedValueLayer


def cache_values(cache: Cache, value_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Add values `(batch, kv_heads, length, head_dim)` to the cache of a layer that has no keys, and return all of them."""
    return cache.update(value_states[..., :0], value_states, layer_idx)[1]


def adopt_cache(cache: Cache, mixers: Iterable[nn.Module]) -> None:
    """Give each layer of a cache the kind that its mixer keeps.

    Args:
        cache: empty, or filled by the same model, or, where mixers keep values, with a learned prefix.
        mixers: modules with `cache_kind` (a class with `in_place_of`, or `None` for keys and values) and `layer_idx`.

    Raises:
        ValueError: if a layer was filled by another mixer, as far as it can be told.
    """
    for mixer in mixers:
        if mixer.cache_kind is not None:
            while len(cache.layers) <= mixer.layer_idx and cache.layer_class_to_replicate is not None:
                cache.layers.append(cache.layer_class_to_replicate())
        elif len(cache.layers) <= mixer.layer_idx:
            continue
        layer = cache.layers[mixer.layer_idx]
        adopted_as = getattr(layer, "adopted_as", mixer.cache_kind)
        if adopted_as is not mixer.cache_kind:
            raise ValueError(
                f"Layer {mixer.layer_idx} of the cache was made for a mixer that keeps {_content(adopted_as)}, but "
                f"{type(mixer).__name__} keeps {_content(mixer.cache_kind)}. Use a cache of this model, or none."
            )
        if adopted_as is None or isinstance(layer, adopted_as) or hasattr(layer, "adopted_as"):
            continue
        adopted = adopted_as.in_place_of(layer)
        adopted.adopted_as = adopted_as
        cache.layers[mixer.layer_idx] = adopted


def _content(cache_kind: type | None) -> str:
    return "keys and values" if cache_kind is None else f"a {cache_kind.__name__}"
