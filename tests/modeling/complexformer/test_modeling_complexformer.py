"""ComplexFormer: scores, bases, positions, and bad input."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.complexformer.configuration_complexformer import ComplexFormerConfig
from hf_attn.modeling.complexformer.modeling_complexformer import (
    ComplexFormerAttention,
    ComplexFormerForCausalLM,
    make_rotary_embedding,
    position_angles,
)
from hf_attn.modeling.complexformer.plots import plot_head_angles
from hf_attn.modeling.complexformer.turn import turn
from tests.batteries.generation import spread_weights


def make_attention(**fields) -> ComplexFormerAttention:
    torch.manual_seed(0)
    config = ComplexFormerConfig.from_variant("tiny", **{"num_key_value_heads": 4, **fields})
    attention = ComplexFormerAttention(config, 0)
    torch.nn.init.normal_(attention.delta_params)
    torch.nn.init.normal_(attention.bias_params)
    return attention


@torch.no_grad()
def scores(attention, hidden_states, first_position=0):
    rotary = make_rotary_embedding(attention.config)
    positions = torch.arange(hidden_states.shape[1])[None] + first_position
    queries, keys = attention.queries_and_keys(hidden_states, position_angles(rotary, hidden_states, positions))
    return queries @ keys.transpose(-1, -2)


@torch.no_grad()
def pairwise_scores(attention, hidden_states):
    """The definition, with an angle for every pair of tokens."""
    queries, keys = super(ComplexFormerAttention, attention).queries_and_keys(hidden_states, None)

    def polar(states):
        real, imaginary = states.chunk(2, dim=-1)
        return (real**2 + imaginary**2).sqrt(), torch.atan2(imaginary, real)

    (q_size, q_angle), (k_size, k_angle) = polar(queries), polar(keys)
    length, pairs = hidden_states.shape[1], q_size.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(pairs) / pairs)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    angle = q_angle[:, :, :, None] - k_angle[:, :, None]
    adapted = attention.delta_params[:, None, None] * angle + attention.bias_params[:, None, None]
    cosine = (adapted + distance[..., None] * frequencies).cos()
    return (q_size[:, :, :, None] * k_size[:, :, None] * cosine).sum(-1)


def test_turning_once_is_the_pairwise_definition():
    attention, states = make_attention(), torch.randn(2, 12, 32)
    torch.testing.assert_close(scores(attention, states), pairwise_scores(attention, states), atol=1e-5, rtol=1e-5)


def test_delta_one_and_bias_zero_is_rotary_attention():
    attention, states = make_attention(), torch.randn(2, 12, 32)
    torch.nn.init.ones_(attention.delta_params)
    torch.nn.init.zeros_(attention.bias_params)
    rotary = make_rotary_embedding(attention.config)
    queries, keys = super(ComplexFormerAttention, attention).queries_and_keys(states, None)
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary(states, torch.arange(12)[None]))
    torch.testing.assert_close(scores(attention, states), queries @ keys.transpose(-1, -2), atol=1e-5, rtol=1e-5)


def test_without_delta_only_sizes_and_positions_count():
    attention, states = make_attention(), torch.randn(1, 6, 32)
    torch.nn.init.zeros_(attention.delta_params)
    before = scores(attention, states)
    with torch.no_grad():  # a quarter turn of every query
        real, imaginary = attention.q_proj.weight.unflatten(0, (4, 2, 4)).unbind(1)
        attention.q_proj.weight.copy_(torch.stack((-imaginary, real), 1).flatten(0, 2))
    torch.testing.assert_close(scores(attention, states), before, atol=1e-5, rtol=1e-5)


def test_positions_count_by_their_difference_and_sizes_scale_scores():
    attention, states = make_attention(), torch.randn(1, 6, 32)
    before = scores(attention, states)
    torch.testing.assert_close(scores(attention, states, first_position=50), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        attention.q_proj.weight.mul_(3)
    torch.testing.assert_close(scores(attention, states), 3 * before, atol=1e-4, rtol=1e-4)


def test_zeros_have_finite_gradients():
    states = torch.zeros(1, 2, 3, 8, requires_grad=True)
    delta, bias = torch.randn(2, 1, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    turn(states, delta, bias, torch.zeros(3, 4)).sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in (states, delta, bias))


def test_gradients_are_those_of_the_definition():
    states = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    delta, bias = (torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: turn(*leaves, positions), (states, delta, bias))
    assert torch.autograd.gradcheck(lambda *leaves: turn(*leaves, None, positions), (states, delta))


def test_angles_are_float32_in_a_bfloat16_model():
    attention, states = make_attention(), torch.randn(1, 8, 32)
    exact = scores(attention, states, first_position=30000)
    low = scores(attention.bfloat16(), states.bfloat16().float().bfloat16(), first_position=30000)
    near = scores(attention, states.bfloat16(), first_position=0)
    # The rounding of weights and states remains; angles rounded to bfloat16 would be wrong by whole turns.
    torch.testing.assert_close(low.float(), near.float(), atol=0.15 * float(exact.abs().max()), rtol=0)


BASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 4, "head_dim": 16}),
    "scaled_rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}},
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_from_base_computes_what_the_base_computes(name, tmp_path):
    config_class, model_class, fields = BASES[name]
    torch.manual_seed(0)
    base = model_class(
        config_class(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            **fields,
        )
    )
    base = spread_weights(base).eval()
    model = ComplexFormerForCausalLM.from_base(base)
    ids = torch.randint(1, 64, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            found = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert all(name.endswith(("delta_params", "bias_params")) for name in model.base_report.new)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.score_scale == model.config.score_scale
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    # from a model of the family: learned parameters are kept
    with torch.no_grad():
        loaded.model.layers[0].self_attn.delta_params.fill_(0.5)
    again = ComplexFormerForCausalLM.from_base(loaded)
    assert again.config.score_scale == model.config.score_scale
    assert bool((again.model.layers[0].self_attn.delta_params == 0.5).all())


def test_parameters_of_an_attention():
    """4 D^2 + D: delta and bias together add the width."""
    attention = make_attention()
    assert sum(parameter.numel() for parameter in attention.parameters()) == 4 * 32**2 + 32


def test_initial_values_are_those_of_the_code():
    model = ComplexFormerForCausalLM(ComplexFormerConfig.from_variant("tiny", hidden_size=256, head_dim=64))
    deltas = torch.cat([layer.self_attn.delta_params.flatten() for layer in model.model.layers])
    assert abs(float(deltas.std()) / 32**-0.5 - 1) < 0.35
    assert all(bool((layer.self_attn.bias_params == 0).all()) for layer in model.model.layers)


def test_what_heads_have_learned_can_be_drawn():
    figure = plot_head_angles(ComplexFormerForCausalLM(ComplexFormerConfig.from_variant("tiny")))
    titles = [axes.get_title("left") for axes in figure.axes]
    assert "delta, layer 0" in titles and "bias, layer 1" in titles
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2))
    with pytest.raises(ValueError, match="no complex attention"):
        plot_head_angles(llama)


def test_bad_configurations_say_what_is_wrong():
    for fields, message in (
        ({"head_dim": 7}, "head_dim must be even"),
        ({"score_scale": 0.0}, "score_scale=0.0 is out of range: it must be above 0"),
        ({"frequency_rounding": "float16"}, "frequency_rounding"),
        (
            {
                "frequency_rounding": "bfloat16",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            "default rotary",
        ),
    ):
        with pytest.raises(Exception, match=message):
            ComplexFormerConfig.from_variant("tiny", **fields)


def test_a_converter_that_does_not_fit_says_so():
    weights = {f"{name}.weight": torch.randn(8, 8) for name in ("W_q", "W_k", "W_v", "W_o")}
    weights |= {"delta_params": torch.randn(2, 2), "bias_params": torch.randn(2, 2), "g": torch.ones(2)}
    config = {"level": "attention", "d_model": 8, "num_heads": 2}
    assert from_official("complexformer", weights, config=config).config.score_scale == 1.0
    for change, message in (({"num_heads": 4}, "num_heads=2"), ({"scale": 2}, "scale"), ({"level": "layer"}, "level")):
        with pytest.raises(ConversionError, match=message):
            from_official("complexformer", weights, config=config | change)
    with pytest.raises(ConversionError, match="W_z"):
        from_official("complexformer", weights | {"W_z.weight": torch.ones(1)}, config=config)
