"""Combiner models: decoding from summaries, other models with Combiner attention, bases, and bad input."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import hf_attn
from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import from_official
from hf_attn.kernels.combiner.plan import KINDS, ROWMAJOR
from hf_attn.modeling.combiner.configuration_combiner import CombinerConfig, CombinerEncoderConfig
from hf_attn.modeling.combiner.modeling_combiner import CombinerForCausalLM, CombinerForMaskedLM
from tests.batteries.generation import spread_weights


def make_model(**fields) -> CombinerForCausalLM:
    torch.manual_seed(0)
    model = spread_weights(CombinerForCausalLM(CombinerConfig.from_variant("tiny", **fields))).eval()
    model.generation_config.eos_token_id = None
    return model


def llama(**fields) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = spread_weights(LlamaForCausalLM(config)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", [*KINDS, ROWMAJOR])
@torch.no_grad()
def test_decoding_from_summaries_is_the_full_forward(kind):
    """Token by token and in chunks, over many segments, in a batch whose rows begin in different columns."""
    model = make_model(combiner_kind=kind, combiner_segment_length=3)
    ids = torch.randint(3, 99, (3, 26))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, steps = None, []
    # Fewer tokens than a segment has, and more.
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 14), *((i, i + 1) for i in range(14, 26))):
        output = model(
            ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[valid], full[valid], atol=1e-4, rtol=1e-4)


def test_the_cache_of_closed_segments_is_their_summaries():
    model = make_model(combiner_segment_length=4)
    cache = model(torch.randint(3, 99, (1, 42)), use_cache=True).past_key_values
    state = cache.layers[0].state
    assert cache.get_seq_length() == 42
    assert state.key.shape[2] == 4
    assert state.span_key.shape[2] == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_generates_with_the_attention_functions(kind):
    name = f"combiner_{kind}"
    model = llama(combiner_segment_length=3)
    model.set_attn_implementation(name)
    hf_attn.uses_attention(model, name)
    ids = torch.randint(1, 64, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    first = model.generate(ids[1:, :1], past_key_values=hf_attn.CombinerCache(), max_new_tokens=4, do_sample=False)
    assert first.tolist() == model.generate(ids[1:, :1], use_cache=False, max_new_tokens=4, do_sample=False).tolist()
    without = model.generate(ids, use_cache=False, **settings)
    cached = model.generate(ids, past_key_values=hf_attn.CombinerCache(), **settings)
    assert cached.tolist() == without.tolist()
    beams = model.generate(ids, past_key_values=hf_attn.CombinerCache(), num_beams=3, **settings)
    assert beams.tolist() == model.generate(ids, use_cache=False, num_beams=3, **settings).tolist()


def test_another_cache_is_refused_with_what_to_do():
    model = llama()
    model.set_attn_implementation("combiner_fixed")
    with pytest.raises(ValueError, match="CombinerCache"):
        model.generate(torch.randint(1, 64, (1, 5)), max_new_tokens=3)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="is for models whose attn_implementation is one of combiner_"):
        model.generate(torch.randint(1, 64, (1, 5)), past_key_values=hf_attn.CombinerCache(), max_new_tokens=3)


def test_bert_is_bidirectional_and_padding_does_not_matter():
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    config.combiner_segment_length = 4
    model = BertForMaskedLM._from_config(config, attn_implementation="combiner_fixed").eval()
    ids = torch.randint(1, 64, (1, 10))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    mask = (padded > 0).long()
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :10], model(ids).logits)
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] % 63) + 1
        assert not torch.equal(model(changed).logits[:, 0], model(ids).logits[:, 0])
    model.set_attn_implementation("combiner_logsparse")
    with pytest.raises(ValueError, match="causal attention only"):
        model(ids)


def test_rowmajor_needs_the_family():
    model = llama()
    model.set_attn_implementation("combiner_rowmajor")
    with pytest.raises(ValueError, match="CombinerForCausalLM"):
        model(torch.randint(1, 64, (1, 5)))


@torch.no_grad()
def test_from_base_is_the_base_while_all_is_one_segment():
    base = llama()
    ids = torch.randint(1, 64, (2, 12))
    model = CombinerForCausalLM.from_base(base, combiner_segment_length=64)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.base_report.new == ()
    rowmajor = CombinerForCausalLM.from_base(base, combiner_kind="rowmajor", combiner_segment_length=64)
    assert all(".row_keys." in name for name in rowmajor.base_report.new)
    torch.testing.assert_close(rowmajor(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "rowmajor", "vertical", "horizontal"])
def test_a_masked_model_learns_from_both_sides(kind):
    model = CombinerForMaskedLM(CombinerEncoderConfig.from_variant("tiny", combiner_kind=kind))
    ids = torch.randint(3, 99, (2, 13))
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids.masked_fill(labels >= 0, 1), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_number_of_parameters():
    """V D + N (4 D Q + 2 D M + M + D + 4 D) + 2 D + D V + V, and N (2 D Q + 2 D) for summaries with weights."""
    d, q, m, v, n = 32, 32, 37, 99, 2
    common = v * d + n * (4 * d * q + 2 * d * m + m + 5 * d) + 2 * d + d * v + v
    fields = {"num_key_value_heads": 4}
    count = {kind: make_model(combiner_kind=kind, **fields).num_parameters() for kind in ("fixed", "rowmajor")}
    assert count == {"fixed": common, "rowmajor": common + n * (2 * d * q + 2 * d)}


def test_bad_configurations_say_what_is_wrong():
    for fields, message in (
        ({"combiner_segment_length": 0}, "combiner_segment_length"),
        ({"combiner_kind": "spiral"}, "combiner_kind"),
        ({"sliding_window": 4}, "sliding windows"),
        ({"own_segment_summary": True}, "encoders"),
        ({"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "relu"}, None),
        ({"hidden_size": 33, "head_dim": 8}, "even hidden_size"),
    ):
        if message is None:
            CombinerConfig.from_variant("tiny", **fields)
        else:
            with pytest.raises(Exception, match=message):
                CombinerConfig.from_variant("tiny", **fields)
    with pytest.raises(Exception, match="causal models only"):
        CombinerEncoderConfig.from_variant("tiny", combiner_kind="mixture")


def test_the_segment_length_is_near_the_square_root():
    config = CombinerConfig.from_variant("tiny", combiner_segment_length=None, max_position_embeddings=1024)
    assert config.combiner_segment_length == 32


def test_a_converter_that_does_not_fit_says_so():
    weights = {
        **{f"{name}/kernel": torch.randn(8, 2, 4) for name in ("query", "key", "value")},
        "DenseGeneral_0/kernel": torch.randn(2, 4, 8),
    }
    config = {"model": "fixed", "max_len": 8, "max_seg_len": 4}
    assert from_official("combiner", weights, config=config).config.combiner_kind == "fixed"
    for change, message in (
        ({"model": "spiral"}, "spiral"),
        ({"num_heads": 3}, "num_heads=2"),
        ({"max_seg_len": None}, "max_seg_len"),
        ({"causall": False}, "causall"),
        ({"pool": "deepset-max"}, "pool"),
    ):
        with pytest.raises(ConversionError, match=message):
            from_official("combiner", weights, config=config | change)


def test_cropping_and_right_padding_are_refused():
    model = make_model()
    ids = torch.randint(3, 99, (2, 6))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="assistant"):
        cache.crop(-2)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="padding_side"):
        model(ids[:, :1], attention_mask=torch.cat((mask, mask[:, :1]), 1), past_key_values=cache)
