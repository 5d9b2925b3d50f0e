"""Attention indicators: computed by hand, on models of transformers, as a table and a plot."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel, set_seed

from hf_attn.analysis import AttentionIndicators, attention_indicators, head_diversity, measure_attention
from tests.batteries.text import llama


def test_uniform_causal_map_by_hand():
    length = 4
    attention = torch.ones(length, length).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    found = attention_indicators(attention)
    rows = range(1, length + 1)
    expected = {
        "entropy": sum(math.log(row) for row in rows),
        "concentration": sum(1 / row for row in rows) ** 0.5,
        "sink": sum(1 / row for row in rows) / length,
        "focus_0": sum(1 / row for row in rows) / length,
        "focus_1": sum(1 / row for row in rows if row > 1) / (length - 1),
        "focus_2": sum(1 / row for row in rows if row > 2) / (length - 2),
        "focus_3": 1 / 4,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    identity = torch.eye(length)
    diversity = head_diversity(torch.stack((attention, identity)))
    by_hand = (attention - identity).abs().tril().sum() / 2 * 2 / (length * (length + 1))
    assert diversity.item() == pytest.approx(by_hand.item())


def test_models_of_transformers(tmp_path):
    set_seed(0)
    decoder = llama()
    decoder.train()
    result = measure_attention(decoder, [torch.arange(2, 12), torch.arange(3, 13)[None]], progress=False)
    assert decoder.training and decoder.config._attn_implementation != "eager"
    assert result.num_samples == 2 and len(result.layers) == decoder.config.num_hidden_layers
    assert len(result.by_head["sink"][0]) == decoder.config.num_attention_heads
    lines = str(result).splitlines()
    assert len(lines) == 2 + len(result.layers) and "concentration" in lines[1]
    result.plot(tmp_path / "indicators.png")
    assert (tmp_path / "indicators.png").read_bytes().startswith(b"\x89PNG")

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=50, **sizes))
    assert len(measure_attention(encoder, [[1, 2, 3, 4, 5]], progress=False).diversity) == 2
    images = [{"pixel_values": torch.randn(1, 3, 16, 16)}]
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
    assert measure_attention(vit, images, progress=False).by_head["focus_3"][0].isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="dataset is empty"):
        AttentionIndicators.from_maps([])
    with pytest.raises(ValueError, match=r"shape \(batch, heads, length, length\)"):
        AttentionIndicators.from_maps([[torch.ones(1, 2, 3, 4)]])
    with pytest.raises(ValueError, match="returns 1 maps, but layers has 2 names"):
        AttentionIndicators.from_maps([[torch.ones(1, 2, 3, 3)]], layers=[0, 1])
