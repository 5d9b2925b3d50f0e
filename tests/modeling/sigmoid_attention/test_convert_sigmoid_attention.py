"""Official checkpoints of sigmoid attention: layouts, and round trips."""

import math

import pytest
import torch
from torch import nn

from hf_attn.checkpoints.official import ConversionError, from_official
from hf_attn.modeling.sigmoid_attention.configuration_sigmoid_attention import SigmoidAttentionConfig
from hf_attn.modeling.sigmoid_attention.convert_sigmoid_attention import to_official
from hf_attn.modeling.sigmoid_attention.modeling_sigmoid_attention import SigmoidAttentionForCausalLM


GALA = {
    "num_layers": 2,
    "hidden_dim": 24,
    "num_heads": 4,
    "vocab_size": 41,
    "ffn_dim": 32,
    "norm_structure": "hybridnorm",
    "position_encoding": "alibi",
    "seq_len": 16,
    "subtract_seq_len_bias": True,
}
SIMULATOR = {
    "vocab_size": 37,
    "dim": 32,
    "num_heads": 4,
    "num_blocks": 2,
    "mlp_hidden": 48,
    "bias": False,
    "qk_norm": True,
    "position": "rope",
    "attn_bias": -2.5,
    "attn_temp": 0.25,
    "layerscale": True,
}


def model_for(arguments: dict) -> SigmoidAttentionForCausalLM:
    """A model of our own with the architecture that official arguments describe, and random weights."""
    if "num_layers" in arguments:
        config = SigmoidAttentionConfig(
            vocab_size=arguments["vocab_size"],
            hidden_size=arguments["hidden_dim"],
            intermediate_size=arguments["ffn_dim"],
            num_hidden_layers=arguments["num_layers"],
            num_attention_heads=arguments["num_heads"],
            max_position_embeddings=arguments["seq_len"],
            sigmoid_bias=None if arguments["subtract_seq_len_bias"] else 0.0,
            position_embedding_type=arguments["position_encoding"],
            norm_structure=arguments["norm_structure"],
            qk_norm_after_rope=True,
        )
    else:
        config = SigmoidAttentionConfig(
            vocab_size=arguments["vocab_size"],
            hidden_size=arguments["dim"],
            intermediate_size=arguments["mlp_hidden"],
            num_hidden_layers=arguments["num_blocks"],
            num_attention_heads=arguments["num_heads"],
            sigmoid_bias=arguments["attn_bias"] or 0.0,
            attention_log_temperature=arguments["attn_temp"] or 0.0,
            position_embedding_type=arguments["position"] or "none",
            norm_structure="prenorm",
            norm_type="layer_norm",
            final_norm_eps=1e-6,
            qk_norm=arguments["qk_norm"],
            layer_scale_init_value=0.1 if arguments["layerscale"] else None,
            hidden_act="gelu",
            gated_mlp=False,
            attention_bias=arguments["bias"],
            tie_word_embeddings=False,
        )
    torch.manual_seed(0)
    model = SigmoidAttentionForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        GALA,
        {**GALA, "position_encoding": "rope", "norm_structure": "prenorm", "subtract_seq_len_bias": False},
        {**GALA, "position_encoding": "rope", "num_layers": 1, "num_heads": 3},
        SIMULATOR,
        {**SIMULATOR, "position": "alibi", "attn_bias": None, "attn_temp": None, "layerscale": False, "bias": True},
        {**SIMULATOR, "position": "sincos", "qk_norm": False},
        {**SIMULATOR, "position": None, "num_blocks": 1},
    ],
    ids=lambda arguments: "-".join(str(value) for value in arguments.values()),
)
def test_there_and_back(arguments):
    model = model_for(arguments)
    official = to_official(model.state_dict(), model.config)
    converted = from_official("sigmoid_attention", official, config=arguments)
    state = converted.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ids = torch.randint(1, 37, (2, 7))
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)


def simulator_logits(weights: dict, arguments: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The simulator's language model from its equations, under its own names."""
    heads, length = arguments["num_heads"], ids.shape[1]
    head_dim = arguments["dim"] // heads
    position = torch.arange(length)
    angles = position[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    allowed = (position[:, None] >= position) & mask[:, None, None, :].bool()

    def linear(states, name):
        return nn.functional.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(states, name, eps=1e-5):
        weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        return states if weight is None else nn.functional.layer_norm(states, weight.shape, weight, bias, eps)

    def rotate(states):
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    states = weights["input_embedding.weight"][ids]
    if arguments["position"] == "sincos":
        width = arguments["dim"]
        for feature in range(width):
            angle = position * 10000.0 ** (-(feature - feature % 2) / width)
            states[..., feature] += angle.cos() if feature % 2 else angle.sin()
    for index in range(arguments["num_blocks"]):
        block = f"blocks.{index}."
        qkv = linear(norm(states, f"{block}norm1"), f"{block}attn.qkv").unflatten(-1, (3, heads, head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = norm(query, f"{block}attn.q_norm"), norm(key, f"{block}attn.k_norm")
        if arguments["position"] == "rope":
            query, key = rotate(query), rotate(key)
        logits = query @ key.transpose(-1, -2) * head_dim**-0.5
        if arguments["position"] == "alibi":
            slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
            logits = logits + slopes[:, None, None] * (position - position[:, None])
        logits = logits * math.exp(arguments["attn_temp"] or 0.0) + (arguments["attn_bias"] or 0.0)
        attended = (logits.sigmoid() * allowed) @ value
        attended = linear(attended.transpose(1, 2).flatten(-2), f"{block}attn.proj")
        states = states + attended * weights.get(f"{block}ls1.gamma", 1.0)
        hidden = nn.functional.gelu(linear(norm(states, f"{block}norm2"), f"{block}mlp.fc1"))
        states = states + linear(hidden, f"{block}mlp.fc2") * weights.get(f"{block}ls2.gamma", 1.0)
    return linear(norm(states, "output_embedding.norm", eps=1e-6), "output_embedding.linear")


@pytest.mark.parametrize("fc2_bias", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.25])
@pytest.mark.parametrize("position", ["rope", "alibi", "sincos", None])
def test_converted_simulator_computes_the_same(position, temperature, fc2_bias):
    arguments = {**SIMULATOR, "position": position, "attn_temp": temperature, "bias": fc2_bias}
    model = model_for(arguments)
    official = to_official(model.state_dict(), model.config)
    if fc2_bias:
        official |= {f"blocks.{index}.mlp.fc2.bias": torch.randn(32) for index in range(2)}
    ids = torch.randint(1, 37, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = from_official("sigmoid_attention", official, config=arguments)(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, simulator_logits(official, arguments, ids, mask), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("gala_85m", {"num_layers": 12, "hidden_dim": 768, "num_heads": 12, "ffn_dim": 2048}),
        ("gala_1b", {"num_layers": 24, "hidden_dim": 2048, "num_heads": 32, "ffn_dim": 5632}),
        ("gala_7b", {"num_layers": 32, "hidden_dim": 4096, "num_heads": 32, "ffn_dim": 11008}),
    ],
)
def test_published_variants_are_what_the_converter_makes(variant, sizes):
    from hf_attn.modeling.sigmoid_attention.convert_sigmoid_attention import _gala_config

    config = _gala_config({**GALA, **sizes, "vocab_size": 32768, "seq_len": 4096})
    assert config.to_dict() == SigmoidAttentionConfig.from_variant(variant).to_dict()


def test_the_bias_is_read_from_the_checkpoint():
    model = model_for(SIMULATOR)
    official = to_official(model.state_dict(), model.config)
    for index in range(2):
        official[f"blocks.{index}.attn.attn_bias"] = torch.tensor([-7.5])
        official[f"blocks.{index}.attn.attn_temp"] = torch.tensor([0.5])
    converted = from_official("sigmoid_attention", official, config=SIMULATOR)
    assert converted.config.sigmoid_bias == -7.5
    assert converted.model.layers[0].self_attn.scaling == pytest.approx(8**-0.5 * math.exp(0.5))
    official["blocks.1.attn.attn_bias"] = torch.tensor([-7.0])
    with pytest.raises(ConversionError, match=r"different values for attn_bias: \[-7.5, -7.0\]"):
        from_official("sigmoid_attention", official, config=SIMULATOR)


def test_incomplete_and_foreign_checkpoints_are_refused():
    model = model_for(GALA)
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(ConversionError, match="decoder/extra"):
        from_official("sigmoid_attention", {**official, "decoder/extra": torch.ones(1)}, config=GALA)
    missing = {name: tensor for name, tensor in official.items() if "scale_query" not in name}
    with pytest.raises(ConversionError, match="scale_query/norm/scale"):
        from_official("sigmoid_attention", missing, config=GALA)
    with pytest.raises(ConversionError, match="not an official layout of sigmoid attention"):
        from_official("sigmoid_attention", {"weight": torch.ones(1)}, config=GALA)
    with pytest.raises(ConversionError, match="position_encoding must be one of alibi, rope, got 'learned'"):
        from_official("sigmoid_attention", official, config={**GALA, "position_encoding": "learned"})
    with pytest.raises(ConversionError, match="ffn_dim"):
        from_official(
            "sigmoid_attention", official, config={name: value for name, value in GALA.items() if name != "ffn_dim"}
        )
    with pytest.raises(ConversionError, match=r"num_layers is 3, but the checkpoint has 2 layers"):
        from_official("sigmoid_attention", official, config={**GALA, "num_layers": 3})
    with pytest.raises(ConversionError, match=r"num_layers is 1, but the checkpoint has 2 layers"):
        from_official("sigmoid_attention", official, config={**GALA, "num_layers": 1})
