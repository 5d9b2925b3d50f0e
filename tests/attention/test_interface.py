"""What transformers expects of the registered names, called as its models call them."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_attn.attention import MECHANISMS
from hf_attn.attention.interface import RESULT_CHANGING_ARGUMENTS


#: all but one whose summaries have weights: it serves the models of its own family only (tests/modeling/combiner)
ON_ANY_MODEL = [mechanism for mechanism in MECHANISMS if mechanism.name != "combiner_rowmajor"]


class SelfAttention(nn.Module):
    """The minimal module that calls an attention function."""

    def __init__(self, is_causal: bool):
        super().__init__()
        self.config = LlamaConfig()
        self.is_causal = is_causal


@pytest.mark.parametrize(
    ("mechanism", "name"),
    [pytest.param(mechanism, name, id=name) for mechanism in ON_ANY_MODEL for name in mechanism.names],
)
class TestContract:
    """What transformers expects of a registered name."""

    def call(self, mechanism, name, mask=None, kv_len=5, **arguments):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 2, 5, 16, generator=generator)
        key = torch.cat([query, torch.randn(1, 2, kv_len - 5, 16, generator=generator)], dim=2)
        module = SelfAttention(is_causal=True)
        try:
            return AttentionInterface._global_mapping[name](module, query, key, key, mask, **arguments)
        except ValueError as error:
            if "does not support this call: " not in str(error):
                raise
            return pytest.skip(str(error))

    def test_name_has_its_mask_function(self, mechanism, name):
        assert ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name] is mechanism.mask_function

    def test_name_is_not_read_as_something_else(self, mechanism, name):
        """Models look for these words in a name, and interpret these characters as a repository or a paged cache."""
        assert not [word for word in ("flash", "sdpa", "flex_attention", "/", "|", "paged") if word in name]

    @pytest.mark.parametrize("argument", RESULT_CHANGING_ARGUMENTS)
    def test_arguments_that_would_change_the_result_are_refused(self, mechanism, name, argument):
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' does not support {argument}"):
            self.call(mechanism, name, **{argument: torch.ones(2)})

    def test_the_call_decides_on_causality(self, mechanism, name):
        """`is_causal` of the call takes precedence over that of the module."""
        causal, full = (self.call(mechanism, name, is_causal=is_causal)[0] for is_causal in (None, False))
        torch.testing.assert_close(causal[:, -1], full[:, -1])
        assert not torch.allclose(causal[:, 0], full[:, 0])

    def test_unused_slots_of_a_static_cache_do_not_count(self, mechanism, name):
        plain = self.call(mechanism, name)[0]
        torch.testing.assert_close(self.call(mechanism, name, kv_len=12)[0], plain)

    def test_the_cache_that_a_layer_has_updated_is_no_other_result(self, mechanism, name):
        plain = self.call(mechanism, name)[0]
        for argument in ("cache", "past_key_values"):
            more = self.call(mechanism, name, **{argument: DynamicCache()})[0]
            torch.testing.assert_close(more, plain, rtol=0, atol=0)

    @pytest.mark.parametrize("form", ["none", "boolean", "additive", "segments"])
    def test_sequences_of_a_flattened_batch_do_not_see_each_other(self, mechanism, name, form):
        """With a mask that already separates them (`segments`), a causal mask, or no mask."""
        mask = None if form == "none" else torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
        if form == "segments":
            mask = mask & (torch.arange(5)[:, None] // 3 == torch.arange(5) // 3)
        if form == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
        flat = self.call(mechanism, name, mask=mask, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=3)[0]
        module = SelfAttention(is_causal=True)
        tensor = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
        alone = [
            AttentionInterface._global_mapping[name](module, part, part, part, None)[0]
            for part in tensor.split([3, 2], dim=2)
        ]
        torch.testing.assert_close(flat, torch.cat(alone, dim=1))

    def test_arguments_without_meaning_are_ignored(self, mechanism, name):
        plain = self.call(mechanism, name)[0]
        more = self.call(mechanism, name, position_ids=torch.arange(5), use_cache=True, softcap=None)[0]
        torch.testing.assert_close(more, plain, rtol=0, atol=0)


@pytest.mark.parametrize("mechanism", ON_ANY_MODEL, ids=lambda mechanism: mechanism.name)
def test_weights_are_returned_on_request(mechanism):
    """Also by the automatic name, independent of its choice without weights; with GQA, there is one map per query head."""
    module = SelfAttention(is_causal=True)
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    for name in (mechanism.name, f"{mechanism.name}_eager"):
        output, weights = AttentionInterface._global_mapping[name](
            module, query, key, key, None, output_attentions=True
        )
        assert weights.shape == (2, 4, 6, 6)
        assert not weights.triu(1).any()
        torch.testing.assert_close(output, (weights @ key.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("mechanism", ON_ANY_MODEL, ids=lambda mechanism: mechanism.name)
def test_flattened_batches_have_one_row(mechanism):
    tensor, lengths = torch.randn(2, 2, 5, 16), torch.tensor([0, 3, 5])
    attention = AttentionInterface._global_mapping[mechanism.name]
    with pytest.raises(ValueError, match="this one has 2"):
        attention(SelfAttention(True), tensor, tensor, tensor, None, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
