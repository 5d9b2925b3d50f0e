"""Models with a selectable token mixer: caches, padding, classification, training, conversion, bad input."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_attn import TokenMixerConfig, TokenMixerForCausalLM, TokenMixerForSequenceClassification, from_official
from hf_attn.checkpoints.files import ConversionError
from hf_attn.mixers import MIXERS, causal_mixers
from tests.batteries.generation import spread_weights


def make(mixer, model_class=TokenMixerForCausalLM, **fields):
    set_seed(0)
    causal = model_class is TokenMixerForCausalLM
    config = TokenMixerConfig.from_variant("tiny", mixer=mixer, **{"causal": causal, **fields})
    return spread_weights(model_class(config)).eval()


def token_ids(*shape):
    return torch.randint(1, 99, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", causal_mixers())
def test_a_cache_and_left_padding_change_nothing(mixer):
    model, ids = make(mixer), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions)
        alone = model(ids[1:, 4:]).logits
        assert_close(full.logits[1:, 4:], alone, rtol=1e-4, atol=1e-4)
        cache, logits = None, []
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            part = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = part.past_key_values
            logits.append(part.logits)
    assert_close(torch.cat(logits, 1)[0], full.logits[0], rtol=1e-4, atol=1e-4)
    assert_close(torch.cat(logits, 1)[1, 4:], full.logits[1, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_classifies_independent_of_padding(mixer, tmp_path):
    model, ids = make(mixer, TokenMixerForSequenceClassification), token_ids(3, 9)
    ids[1, 5:] = 0
    mask = (ids != 0).long()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 1])).logits
        assert_close(logits[1:2], model(ids[1:2, :5]).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert_close(loaded(ids, attention_mask=mask).logits, logits)


@pytest.mark.parametrize("mixer", ["softmax", "long_conv", "performer"])
def test_training_reaches_every_weight_and_lowers_the_loss(mixer):
    model, ids = make(mixer).train(), token_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        if not losses:
            assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_crop_forgets_the_last_tokens():
    model, ids = make("softmax"), token_ids(1, 10)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-3)
        continued = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits
        assert_close(continued, model(ids).logits[:, 7:], rtol=1e-4, atol=1e-4)


def test_bfloat16_and_an_empty_batch(tmp_path):
    make("aft_full").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model(token_ids(2, 5)).logits.dtype == torch.bfloat16
    assert make("softmax")(token_ids(0, 5)).logits.shape == (0, 5, 99)


def test_conversion_takes_what_a_mixer_needs():
    weights = {name: torch.randn(8, 6, dtype=torch.float64) for name in ("w_q", "w_k", "w_v")}
    weights["aft_bias"] = torch.randn(5, 5, dtype=torch.float64)
    config = {"length": 5, "embed_dim": 8, "head_dim": 6}
    mixer = from_official("unified_long_sequence", weights, {**config, "mixer": "softmax"})
    assert_close(mixer.q_proj.weight, weights["w_q"].T)
    for change, message in (
        ({"mixer": "mean"}, "no token mixer 'mean'"),
        ({"mixer": "linformer"}, "no weights for e, f"),
        ({"mixer": "softmax", "landmark": 3}, "Did you mean landmarks"),
    ):
        with pytest.raises(ConversionError, match=message):
            from_official("unified_long_sequence", weights, {**config, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenMixerConfig(mixer="sofmax"), "no token mixer 'sofmax'"),
        (lambda: TokenMixerConfig(mixer="fourier"), "no causal form; use a classifier with causal=False"),
        (lambda: TokenMixerConfig(num_attention_heads=4), "one head, got num_attention_heads=4"),
        (lambda: TokenMixerConfig(mixer_window=-1), "mixer_window=-1 is out of range"),
        (lambda: TokenMixerConfig(mixer="spatial_gating", hidden_size=33), "hidden_size must be even, got 33"),
        (lambda: make("fourier", causal=False), "needs causal=True"),
        (lambda: make("softmax")(token_ids(1, 65)), "64 positions .max_position_embeddings., but got 65 tokens"),
        (lambda: make("softmax")(token_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4)), "masks of token pairs"),
        (
            lambda: make("fourier", TokenMixerForSequenceClassification)(token_ids(1, 4), use_cache=True),
            "does not support a cache",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(Exception, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError) or "Strict" in type(caught.value).__name__
