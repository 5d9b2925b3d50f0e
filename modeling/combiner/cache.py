"""The cache of Combiner attention, for the models of this family and for others that use its attention functions."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_attn.kernels.combiner.decoding import CombinerState


class CombinerCacheLayer(CacheLayerMixin):
    """Keeps a [`~hf_attn.kernels.combiner.decoding.CombinerState`], which the attention function fills and reads.

    The state travels with the keys: `update` returns the new keys and values with a reference to it.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, **kwargs):
        super().__init__()
        self.state = CombinerState()
        self.state_device = None
        #: length of the state when keys were last put in, which reading them changes
        self.unread_from: int | None = None

    @classmethod
    def in_place_of(cls, layer: CacheLayerMixin) -> "CombinerCacheLayer":
        """A new layer for a mixer that found `layer` in the cache.

        Raises:
            ValueError: if the other layer holds tokens, which came without their queries.
        """
        if int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"The cache contains keys and values of {int(layer.get_seq_length())} tokens, but Combiner also needs "
                "their queries: a cache that was filled by another model or with a learned prefix (prefix tuning) "
                "cannot be used here."
            )
        return cls()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.unread_from == self.state.seen_tokens:
            raise ValueError(
                "This cache is for models whose attn_implementation is one of combiner_...: other attention functions "
                "would see only the newest tokens. Use transformers' DynamicCache."
            )
        self.unread_from = self.state.seen_tokens if key_states.shape[-2] > 0 else None
        self.is_initialized = True
        # The attention function gets the tensor itself; the reference is stored on a view, so that the projection is not changed.
        key_states = key_states.view_as(key_states)
        key_states.combiner_state = self.state
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.state.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.seen_tokens + int(query_length), 0

    def reset(self) -> None:
        self.state.reset()
        self.unread_from = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: always, unless there is nothing to do: summaries cannot be taken back.
        """
        if tokens_to_remove and self.state.seen_tokens:
            raise ValueError(
                "The summaries of a Combiner cache cannot remove single tokens, as assisted decoding requires: decode "
                "without an assistant."
            )

    def offload(self) -> None:
        if self.state.key is not None:
            self.state_device = self.state.key.device
            self.state.apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.state_device is not None:
            self.state.apply(lambda tensor: tensor.to(self.state_device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.apply(lambda tensor: tensor[indices.to(tensor.device)])


class CombinerCache(Cache):
    """A cache for any model of transformers with `attn_implementation="combiner_..."`.

        model.generate(**inputs, past_key_values=CombinerCache())

    The models of this family make theirs by themselves.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=CombinerCacheLayer)


__all__ = ["CombinerCache", "CombinerCacheLayer"]
