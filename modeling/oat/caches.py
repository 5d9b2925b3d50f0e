"""Caches of the decoder: scenes that their scanpaths share, and scanpaths that grow in place."""

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


class SceneLayer(DynamicLayer):
    """Keys and values of the encoded scenes, one row per scene, for any number of scanpaths per scene."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Nothing moves: the beams of a scene change places among themselves."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing is repeated."""


class GrowingLayer(DynamicLayer):
    """Keys and values of the fixations so far, in preallocated memory, so that a step does not copy earlier ones."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; see transformers' `DynamicLayer.update`."""
        if key_states.requires_grad:  # tensors that a backward pass needs must not be overwritten
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # Reordering and selecting replace the views by other tensors.
        is_view = self._room is not None and self.keys.data_ptr() == self._room[0].data_ptr()
        if not is_view or len(self._room[0]) != len(key_states) or self._room[0].shape[-2] < end:
            room = [
                states.new_empty(*states.shape[:-2], max(16, 2 * end), states.shape[-1])
                for states in (key_states, value_states)
            ]
            if start:
                room[0][..., :start, :], room[1][..., :start, :] = self.keys, self.values
            self._room = tuple(room)
        for store, states in zip(self._room, (key_states, value_states), strict=True):
            store[..., start:end, :] = states
        self.keys, self.values = (store[..., :end, :] for store in self._room)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._room = None


def _cache(layer_class: type[DynamicLayer]) -> DynamicCache:
    cache = DynamicCache()
    Cache.__init__(cache, layer_class_to_replicate=layer_class)
    return cache


def new_cache() -> EncoderDecoderCache:
    """An empty cache."""
    return EncoderDecoderCache(_cache(GrowingLayer), _cache(SceneLayer))


def prepare_cache(cache: EncoderDecoderCache) -> None:
    """Make an empty cache, created by `generate` or by the user, share scenes."""
    if any(cache.is_updated.values()):
        return
    cache.cross_attention_cache = _cache(SceneLayer)
    scanpaths = cache.self_attention_cache
    if type(scanpaths) is DynamicCache and not scanpaths.offloading and scanpaths.get_seq_length() == 0:
        cache.self_attention_cache = _cache(GrowingLayer)


def grows(cache: EncoderDecoderCache) -> bool:
    """Whether the fixations so far are in a cache of this module, whose rows can be repeated."""
    return getattr(cache.self_attention_cache, "layer_class_to_replicate", None) is GrowingLayer
