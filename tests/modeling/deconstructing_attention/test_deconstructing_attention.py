"""Properties from the paper, decoding with every kind of state, and bad input."""

import copy
import subprocess
import sys

import accelerate
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    set_seed,
)

from hf_attn.modeling.deconstructing_attention.configuration_deconstructing_attention import (
    LAYER_KINDS,
    SIMPLE_KINDS,
    DeconstructedConfig,
)
from hf_attn.modeling.deconstructing_attention.modeling_deconstructing_attention import DeconstructedForCausalLM
from tests.batteries.generation import spread_weights


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
STATIC = ("rnd_emb_qk", "fixed_seq_qk")


def make_model(*kinds: str, **fields) -> DeconstructedForCausalLM:
    """A model with these kinds of layers, whose maps affect the output."""
    set_seed(0)
    fields = {"static_length": 40, "static_std": 1.0, "num_key_value_heads": 2, **fields}
    config = DeconstructedConfig.from_variant("tiny", **fields, num_hidden_layers=len(kinds), layer_kinds=list(kinds))
    model = spread_weights(DeconstructedForCausalLM(config)).eval()
    model.generation_config.eos_token_id = None
    return model


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs).logits


# Per-order denominators come close to zero for random queries and keys, which amplifies rounding.
EXACT = [kind for kind in LAYER_KINDS if kind != "taylor_per_order"]
MIXES = [(kind, kind) for kind in EXACT] + [
    ("rnd_emb_qk", "standard", "fixed_seq_qk", "taylor_joint"),
    ("mlp", "non_approximate", "rnd_emb_qk", "static_emb_qk"),
]


@pytest.mark.parametrize("kinds", MIXES, ids="-".join)
def test_decoding_padding_beams_and_implementations_agree(kinds):
    model, input_ids = make_model(*kinds), ids(3, 9)
    full = logits(model, input_ids, use_cache=False)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, input_ids, use_cache=False), full, **TOLERANCE)
    model.set_attn_implementation("sdpa")

    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=cache) for part in input_ids.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, **TOLERANCE)

    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), input_ids), 1)
    mask = (padded != 0).long()
    mask[0, 4], padded[0, 4] = 1, input_ids[0, 1]
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 3:], full, **TOLERANCE)

    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    expected = model.generate(input_ids, **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], expected)
    assert torch.equal(model.generate(input_ids, use_cache=False, **settings), expected)


@pytest.mark.parametrize(
    "kinds",
    [("rnd_emb_qk", "standard"), ("fixed_seq_qk", "taylor_joint", "standard"), ("non_approximate", "static_emb_qk")],
    ids="-".join,
)
def test_static_cache_with_padding_and_offloaded_weights(kinds):
    model, input_ids = make_model(*kinds), ids(2, 7)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}

    def generated(tokens, **kwargs):
        result = model.generate(tokens, output_logits=True, **settings, **kwargs)
        return torch.stack(result.logits)

    expected = generated(input_ids)
    torch.testing.assert_close(generated(input_ids, cache_implementation="static"), expected, **TOLERANCE)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, :2] = 0
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), input_ids), 1)
    cache = StaticCache(config=model.config, max_cache_len=20)
    torch.testing.assert_close(generated(padded, attention_mask=mask, past_key_values=cache), expected, **TOLERANCE)

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.v_proj.weight.device.type == "meta"
    torch.testing.assert_close(generated(input_ids), expected, **TOLERANCE)


def test_layers_with_values_can_forget_tokens():
    model, input_ids = make_model("rnd_emb_qk", "static_emb_qk"), ids(1, 4).repeat(1, 3)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids, prompt_lookup_num_tokens=3, **settings), model.generate(input_ids, **settings)
    )


def test_per_order_recurrence_where_denominators_are_away_from_zero():
    model, input_ids = make_model("taylor_per_order", "standard", num_key_value_heads=4), ids(2, 8)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.copy_(attention.q_proj.weight * 0.01)
        for projection in (attention.q_proj, attention.k_proj):
            projection.bias.fill_(2.0)
    full = logits(model, input_ids, use_cache=False)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, input_ids, use_cache=False), full, **TOLERANCE)
    cache = DynamicCache(config=model.config)
    steps = [logits(model, token, past_key_values=cache) for token in input_ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, **TOLERANCE)


@pytest.mark.parametrize("kind", ["mlp", "taylor_joint", "non_approximate"])
def test_states_have_a_constant_size(kind):
    model = make_model(kind, kind)

    def cached(length):
        cache = DynamicCache(config=model.config)
        logits(model, ids(2, length), past_key_values=cache)
        return sum(state.numel() for layer in cache.layers for state in layer.states.values())

    assert cached(3) == cached(30)
    assert (cached(3) == 0) == (kind == "mlp")


def test_static_layers_cache_values_only():
    model, cache = make_model("rnd_emb_qk", "rnd_emb_qk"), DynamicCache()
    logits(model, ids(2, 5), past_key_values=cache)
    assert cache.layers[0].keys.numel() == 0 and cache.layers[0].values.shape[2] == 5


def test_kinds_have_equal_parameter_counts_and_the_published_ones():
    counts = {make_model(kind, kind, num_key_value_heads=4).num_parameters() for kind in LAYER_KINDS}
    assert len(counts) == 1
    published = {
        "70m": (50_937_344, 76_692_992),
        "160m": (151_926_528, 190_560_000),
        "500m": (436_037_504, 481_109_888),
    }
    for name, expected in published.items():
        for tied, count in zip((True, False), expected, strict=True):
            config = DeconstructedConfig.from_variant(name, tie_word_embeddings=tied)
            with torch.device("meta"):
                model = DeconstructedForCausalLM(config)
            assert model.num_parameters() == count


def test_mlp_logits_depend_on_their_token_only():
    model, input_ids = make_model("mlp", "mlp"), ids(1, 6)
    changed = input_ids.clone()
    changed[0, :5] = ids(5, seed=2)
    assert torch.equal(logits(model, input_ids)[0, -1], logits(model, changed)[0, -1])


@pytest.mark.parametrize("kind", STATIC)
def test_static_maps_do_not_depend_on_the_input(kind):
    model = make_model(kind, "standard", kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first, second = (
            model(ids(2, 8, seed=seed), output_attentions=True, use_cache=False).attentions for seed in (1, 2)
        )
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert not torch.allclose(first[1], second[1])
    torch.testing.assert_close(first[2].sum(-1), torch.ones_like(first[2][..., 0]))


def test_static_embedding_in_the_first_layer_is_standard():
    model = make_model("static_emb_qk")
    standard = DeconstructedForCausalLM(
        DeconstructedConfig.from_dict({**model.config.to_dict(), "layer_kinds": ["standard"]})
    ).eval()
    standard.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model, ids(2, 8)), logits(standard, ids(2, 8)), **TOLERANCE)


def test_scores_above_a_thousand_do_not_overflow():
    model = make_model("non_approximate", "non_approximate")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e3)
    input_ids = ids(2, 8)
    cache = DynamicCache(config=model.config)
    steps = torch.cat([logits(model, token, past_key_values=cache) for token in input_ids.split(1, dim=1)], 1)
    assert steps.isfinite().all()
    torch.testing.assert_close(steps, logits(model, input_ids), **TOLERANCE)


def test_skip_is_a_model_of_the_standard_layers():
    model, input_ids = make_model("rnd_emb_qk", "standard", "mlp", "standard"), ids(2, 6)
    skipped = model.without_simple_layers()
    expected = make_model("standard", "standard")
    state = {
        name.replace("layers.1.", "layers.0.").replace("layers.3.", "layers.1."): tensor
        for name, tensor in model.state_dict().items()
        if "static_input" not in name and "layers.0." not in name and "layers.2." not in name
    }
    expected.load_state_dict(state)
    assert torch.equal(logits(skipped, input_ids), logits(expected, input_ids))
    assert torch.equal(
        skipped.generate(input_ids, max_new_tokens=4, do_sample=False),
        expected.generate(input_ids, max_new_tokens=4, do_sample=False),
    )
    assert skipped.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    with pytest.raises(ValueError, match="No layer would be left"):
        make_model("mlp").without_simple_layers()


@pytest.mark.parametrize(
    ("placement", "standard"),
    [
        ("uniform", []),
        ("hybrid", [*range(2, 25, 2)]),
        ("odd", [*range(1, 25, 2)]),
        ("top", [*range(1, 13)]),
        ("middle", [*range(1, 7), *range(19, 25)]),
        ("bottom", [*range(13, 25)]),
        ("quarter", [4, 8, 12, 16, 20, 24]),
        ("first", [1]),
        ("last", [24]),
        ("bilateral", [1, 24]),
    ],
)
def test_placements_are_those_of_the_paper(placement, standard):
    config = DeconstructedConfig(placement=placement, simple_kind="non_approximate")
    assert [layer for layer, kind in enumerate(config.layer_kinds, 1) if kind == "standard"] == standard
    assert set(config.layer_kinds) - {"standard"} == {"non_approximate"}
    assert DeconstructedConfig.from_dict(config.to_dict()).layer_kinds == config.layer_kinds


@pytest.mark.parametrize("base_classes", [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_all_standard_is_the_base_and_a_hybrid_starts_from_it(base_classes):
    config_class, model_class = base_classes
    config = config_class(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=False,
    )
    base = spread_weights(model_class(config)).eval()
    input_ids = ids(2, 9)
    model = DeconstructedForCausalLM.from_base(base)
    assert not model.base_report.new and not model.base_report.dropped
    torch.testing.assert_close(logits(model, input_ids), logits(base, input_ids), atol=1e-5, rtol=1e-5)
    for kind in SIMPLE_KINDS:
        hybrid = DeconstructedForCausalLM.from_base(base, placement="hybrid", simple_kind=kind, static_length=16)
        assert logits(hybrid, input_ids).isfinite().all()
        report = hybrid.base_report
        assert bool(report.dropped) == (kind == "mlp")
        assert bool(report.new) == (kind in ("mlp", *STATIC))
    again = DeconstructedForCausalLM.from_base(hybrid, placement="uniform", simple_kind="taylor_joint")
    assert again.config.layer_kinds == ["taylor_joint"] * 2


def test_constants_are_saved_and_not_drawn_again(tmp_path):
    model, input_ids = make_model("rnd_emb_qk", "fixed_seq_qk"), ids(2, 6)
    model.model.set_static_ids(ids(40, seed=5))
    model.save_pretrained(tmp_path)
    torch.save((input_ids, logits(model, input_ids)), tmp_path / "expected.pt")
    program = (
        "import sys, torch, hf_attn; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "ids, expected = torch.load(sys.argv[1] + '/expected.pt'); "
        "assert torch.equal(model(ids).logits, expected)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    before = copy.deepcopy(trained.model.static_input.state_dict())
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    first = trained(input_ids, labels=input_ids).loss
    first.backward()
    optimizer.step()
    assert trained(input_ids, labels=input_ids).loss < first
    after = trained.model.static_input.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("through", [True, False])
def test_gradient_through_the_constant_sequence_is_a_choice(through):
    model = make_model("standard", "rnd_emb_qk", static_gradient=through).train()
    # Only its map makes the loss depend on what the first layer does to the constant sequence.
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    model(ids(2, 6), labels=ids(2, 6)).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert (gradient is not None and bool(gradient.any())) == through
    assert model.model.layers[1].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = make_model("rnd_emb_qk", "standard", "static_emb_qk", "taylor_joint").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids(2, 6), labels=ids(2, 6)).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_maps_follow_the_weights():
    model, input_ids = make_model("rnd_emb_qk", "standard"), ids(2, 6)
    logits(model, input_ids)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    torch.testing.assert_close(logits(model, input_ids), logits(model, input_ids, use_cache=False), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    kinds = ("rnd_emb_qk", "taylor_joint", "non_approximate", "static_emb_qk", "mlp")
    model = make_model(*kinds).to(dtype)
    assert model.generate(ids(2, 5), max_new_tokens=3, do_sample=False).shape == (2, 8)
    assert logits(model, ids(2, 5)).isfinite().all()


def test_bad_configurations():
    for fields, message in (
        ({"layer_kinds": ["standard", "other"]}, "layer_kinds has the unknown kinds 'other'"),
        ({"layer_kinds": ["standard"]}, r"one entry per layer \(2\), got 1"),
        ({"layer_kinds": None, "placement": "hybrid", "simple_kind": "other"}, "simple_kind must be one of"),
        ({"placement": "uniform", "simple_kind": "mlp"}, "contradicts placement"),
        ({"layer_kinds": ["rnd_emb_qk", "mlp"], "attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"sliding_window": 8}, "all layer_types must be"),
    ):
        with pytest.raises(Exception, match=message):
            DeconstructedConfig.from_variant("tiny", **fields)


def test_bad_inputs():
    model = make_model("rnd_emb_qk", "standard", static_length=8)
    with pytest.raises(ValueError, match=r"9 positions.*static_length=8"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match="static_length=8"):
        model.generate(ids(1, 7), max_new_tokens=4, do_sample=False)
    cache = DynamicCache(config=model.config)
    logits(model, ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids must continue those of the cache"):
        model(ids(1, 1), past_key_values=cache, position_ids=torch.tensor([[6]]))
    with pytest.raises(ValueError, match="No layer is 'fixed_seq_qk'"):
        model.model.set_static_ids(ids(8))
    with pytest.raises(ValueError, match="must be 40 token ids"):
        make_model("fixed_seq_qk").model.set_static_ids(ids(8))
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="masks of token pairs"):
        make_model("taylor_joint")(ids(1, 4), attention_mask=causal)
    other = make_model("standard")
    filled = DynamicCache(config=other.config)
    logits(other, ids(1, 3), past_key_values=filled)
    with pytest.raises(ValueError, match="mixer caches none"):
        make_model("mlp")(ids(1, 1), past_key_values=filled)
    with pytest.raises(ValueError, match="keys and values of 3 tokens in a layer whose attention map is"):
        make_model("rnd_emb_qk")(ids(1, 1), past_key_values=filled)
    for kind, other in (("standard", "mlp"), ("standard", "rnd_emb_qk"), ("rnd_emb_qk", "mlp")):
        filled = make_model(other)(ids(1, 3), use_cache=True).past_key_values
        with pytest.raises(
            ValueError, match=r"Layer 0 of the cache was made for a mixer that keeps a S.* Use a cache of"
        ):
            make_model(kind)(ids(1, 1), past_key_values=filled)
    filled = make_model("non_approximate")(ids(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="contains maximum, sums, the state of another mixer"):
        make_model("taylor_joint")(ids(1, 1), past_key_values=filled)
