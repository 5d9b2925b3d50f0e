"""GMAN: properties from the paper and its code, and usage."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_attn import GMANConfig, GMANForPrediction, GMANModel
from hf_attn.modeling.gman.layers import GMANBatchNorm
from hf_attn.modeling.gman.modeling_gman import GMANGroupSpatialAttention


def tiny_model(**overrides) -> GMANForPrediction:
    """A model in eval mode whose running statistics are those of some data."""
    torch.manual_seed(0)
    model = GMANForPrediction(GMANConfig.from_variant("tiny", **{"value_mean": 50.0, "value_std": 10.0, **overrides}))
    model.train()
    for module in model.modules():
        if isinstance(module, GMANBatchNorm):
            module.momentum = 0.9
    with torch.no_grad():
        for seed in range(3):
            model(**inputs(model.config, seed=seed))
    return model.eval()


def inputs(config, batch_size=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def features(steps):
        days, slots = (
            torch.randint(size, (batch_size, steps), generator=generator) for size in (7, config.steps_per_day)
        )
        return torch.stack([days, slots], dim=-1)

    values = torch.randn(batch_size, config.context_length, config.num_nodes, generator=generator, dtype=torch.float64)
    return {
        "past_values": (50 + 10 * values).to(dtype),
        "past_time_features": features(config.context_length),
        "future_time_features": features(config.prediction_length),
    }


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("gman_pems", 229_569),
        ("gman_paper", 565_185),
        ("gman_metr", 900_801),
        ("gman_port_1", 209_923),
        ("gman_port_3", 513_795),
        ("gman_port_5", 817_667),
    ],
)
def test_published_sizes(variant, parameters):
    with torch.device("meta"):
        model = GMANForPrediction(GMANConfig.from_variant(variant))
    assert model.num_parameters() == parameters


def test_the_number_of_parameters_depends_on_the_slots_by_one_matrix():
    small, large = (
        GMANForPrediction(GMANConfig.from_variant("tiny", steps_per_day=steps)).num_parameters() for steps in (24, 48)
    )
    assert large - small == 24 * 8


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_permutation_of_the_sensors_permutes_the_forecast(implementation):
    model = tiny_model().double()
    model.set_attn_implementation(implementation)
    batch = inputs(model.config, dtype=torch.float64)
    before = model(**batch).prediction_outputs
    order = torch.randperm(model.config.num_nodes)
    model.set_spatial_embedding(model.gman.embeddings.spatial_embedding[order])
    after = model(**{**batch, "past_values": batch["past_values"][..., order]}).prediction_outputs
    # `eager` takes its softmax in float32.
    atol = 1e-11 if implementation == "sdpa" else 1e-3
    torch.testing.assert_close(after, before[..., order], rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_step_sees(causal, implementation):
    model = tiny_model(causal=causal).double()
    model.set_attn_implementation(implementation)
    batch = inputs(model.config, dtype=torch.float64)
    before = model(**batch).prediction_outputs

    later = {**batch, "future_time_features": batch["future_time_features"].clone()}
    later["future_time_features"][:, -1] = (later["future_time_features"][:, -1] + 1) % 7
    changed = (model(**later).prediction_outputs - before).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.tolist() == ([False] * 3 + [True] if causal else [True] * 4)

    last = {**batch, "past_values": batch["past_values"].clone()}
    last["past_values"][:, -1] += 5
    changed = (model(**last).prediction_outputs - before).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.all()


def test_attentions_and_hidden_states_on_request():
    model = tiny_model()
    config = model.config
    model.set_attn_implementation("sdpa")
    batch = inputs(config)
    plain = model(**batch)
    assert plain.hidden_states is None and plain.spatial_attentions is None
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(outputs.prediction_outputs, plain.prediction_outputs, rtol=1e-5, atol=1e-4)
    past, future, nodes, heads = 5, 4, config.num_nodes, config.num_attention_heads
    steps = [past, past, future, future]
    assert [tuple(maps.shape) for maps in outputs.spatial_attentions] == [(3, heads, s, nodes, nodes) for s in steps]
    assert [tuple(maps.shape) for maps in outputs.temporal_attentions] == [(3, heads, nodes, s, s) for s in steps]
    assert [tuple(maps.shape) for maps in outputs.transform_attentions] == [(3, heads, nodes, future, past)]
    for maps in (*outputs.spatial_attentions, *outputs.temporal_attentions, *outputs.transform_attentions):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert all((maps.triu(1) == 0).all() for maps in outputs.temporal_attentions)
    width = config.hidden_size
    assert [tuple(s.shape) for s in outputs.hidden_states] == [(3, s, nodes, width) for s in [past] * 3 + [future] * 3]


class TestLoss:
    def test_zeros_and_gaps_are_left_out(self):
        model = tiny_model()
        batch = inputs(model.config)
        targets = 50 + torch.rand(3, 4, 6)
        targets[:, :, 2] = 0
        targets[0, 0, 0] = torch.nan
        outputs = model(**batch, future_values=targets)
        kept = (targets != 0) & ~targets.isnan()
        expected = (outputs.prediction_outputs - targets)[kept].abs().mean()
        torch.testing.assert_close(outputs.loss, expected)
        mask = torch.ones_like(targets)
        mask[1] = 0
        masked = model(**batch, future_values=targets, future_observed_mask=mask)
        kept = kept & mask.bool()
        torch.testing.assert_close(masked.loss, (outputs.prediction_outputs - targets)[kept].abs().mean())

    def test_nothing_observed_is_zero_with_a_gradient_of_zero(self):
        model = tiny_model()
        loss = model(**inputs(model.config), labels=torch.full((3, 4, 6), torch.nan)).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())

    def test_zero_is_a_value_without_a_null_value(self):
        model = tiny_model(null_value=None)
        targets = torch.zeros(3, 4, 6)
        outputs = model(**inputs(model.config), labels=targets)
        torch.testing.assert_close(outputs.loss, outputs.prediction_outputs.abs().mean())

    def test_labels_are_another_name(self):
        model = tiny_model()
        batch, targets = inputs(model.config), 50 + torch.rand(3, 4, 6)
        assert model(**batch, labels=targets).loss == model(**batch, future_values=targets).loss
        with pytest.raises(ValueError, match="names of the same argument"):
            model(**batch, labels=targets, future_values=targets)


def test_missing_history_is_the_null_value():
    model = tiny_model()
    batch = inputs(model.config)
    with_zero, with_nan = batch["past_values"].clone(), batch["past_values"].clone()
    with_zero[:, 1, 2], with_nan[:, 1, 2] = 0.0, torch.nan
    mask = torch.ones_like(with_zero)
    mask[:, 1, 2] = 0
    expected = model(**{**batch, "past_values": with_zero}).prediction_outputs
    assert torch.equal(model(**{**batch, "past_values": with_nan}).prediction_outputs, expected)
    assert torch.equal(model(**batch, past_observed_mask=mask).prediction_outputs, expected)


def test_an_index_out_of_range_is_an_unknown_one_or_wraps():
    official, port = tiny_model(), tiny_model(wrap_time_features=True)
    batch = inputs(official.config)
    beyond, unknown = (
        {**batch, "past_time_features": batch["past_time_features"] + shift}
        for shift in (torch.tensor([7, 24]), torch.tensor([70, 240]))
    )
    assert torch.equal(official(**beyond).prediction_outputs, official(**unknown).prediction_outputs)
    assert not torch.equal(official(**beyond).prediction_outputs, official(**batch).prediction_outputs)
    assert torch.equal(port(**beyond).prediction_outputs, port(**batch).prediction_outputs)


def test_generate_returns_one_sample():
    model = tiny_model()
    batch = inputs(model.config)
    sequences = model.generate(**batch).sequences
    assert sequences.shape == (3, 1, 4, 6) and not sequences.requires_grad
    torch.testing.assert_close(sequences[:, 0], model(**batch).prediction_outputs)


@pytest.mark.parametrize("overrides", [{}, {"batch_norm_everywhere": True, "embedding_bias": False}])
def test_a_normalisation_folded_into_its_map_changes_nothing_and_a_hook_prevents_it(overrides):
    model = tiny_model(**overrides).double()
    batch = inputs(model.config, dtype=torch.float64)
    folded = model(**batch).prediction_outputs
    called = set()
    norms = [module for module in model.modules() if isinstance(module, GMANBatchNorm)]
    for module in norms:
        module.register_forward_hook(lambda module, *_: called.add(module))
    torch.testing.assert_close(model(**batch).prediction_outputs, folded)
    assert len(called) == len(norms) > 0
    folded.sum().backward()
    assert all(module.weight.grad is not None for module in norms)


class TestBatchNorm:
    def test_running_variance_is_biased(self):
        norm = GMANBatchNorm(5, eps=1e-3, momentum=0.25)
        states = torch.randn(2, 3, 4, 5)
        output = norm(states)
        rows = states.flatten(0, 2)
        variance = rows.var(dim=0, unbiased=False)
        torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * variance)
        torch.testing.assert_close(norm.running_mean, 0.25 * rows.mean(0))
        torch.testing.assert_close(output.flatten(0, 2), (rows - rows.mean(0)) / (variance + 1e-3).sqrt())
        assert norm.num_batches_tracked == 1

    def test_two_steps_forward_before_one_backward(self):
        norm = GMANBatchNorm(5)
        (norm(torch.randn(4, 5)).sum() + norm(torch.randn(4, 5)).pow(2).sum()).backward()
        assert norm.weight.grad is not None


class TestGroups:
    @pytest.mark.parametrize("group_size", [1, 2, 4, 6])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_against_loops(self, group_size, implementation):
        """Loops over sensors and groups, from the paper's description."""
        config = GMANConfig.from_variant("tiny", group_size=group_size, attn_implementation=implementation)
        torch.manual_seed(0)
        attention = GMANGroupSpatialAttention(config).double().eval()
        attention.output = nn.Identity()
        attention.node_permutation.copy_(torch.randperm(6))
        states = torch.randn(2, 3, 6, 16, dtype=torch.float64)
        output, _ = attention(states)

        query, key, value = attention.project(states, states, states)
        order = attention.node_permutation.tolist()
        groups = [order[start : start + group_size] for start in range(0, 6, group_size)]

        def attend(query, key, value):
            parts = []
            for head in range(2):
                q, k, v = (states[..., 4 * head : 4 * head + 4] for states in (query, key, value))
                parts.append((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)
            return torch.cat(parts, dim=-1)

        local = [attend(*(states[:, :, group] for states in (query, key, value))) for group in groups]
        pooled = torch.stack([states.amax(dim=2) for states in local], dim=2)
        between = attend(
            *(
                getattr(attention, f"group_{n}_norm")(getattr(attention, f"group_{n}_proj")(pooled)).relu()
                for n in "qkv"
            )
        )
        for index, group in enumerate(groups):
            torch.testing.assert_close(output[:, :, group], local[index] + between[:, :, [index]])

    def test_the_groups_are_saved(self, tmp_path):
        model = tiny_model(group_size=4)
        batch = inputs(model.config)
        before = model(**batch).prediction_outputs
        model.save_pretrained(tmp_path)
        loaded = GMANForPrediction.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).prediction_outputs, before)
        permutation = loaded.gman.encoder[0].spatial_attention.node_permutation
        assert permutation.sort().values.tolist() == list(range(6))

    def test_it_learns(self):
        model = tiny_model(group_size=4).train()
        outputs = model(**inputs(model.config), labels=50 + torch.rand(3, 4, 6))
        outputs.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_fresh_process_computes_the_same(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    batch = inputs(model.config)
    torch.save({"batch": batch, "expected": model(**batch).prediction_outputs.detach()}, tmp_path / "case.pt")
    script = """
import sys, torch, hf_attn
from transformers import AutoModelForTimeSeriesPrediction
case = torch.load(sys.argv[1] + "/case.pt")
model = AutoModelForTimeSeriesPrediction.from_pretrained(sys.argv[1])
torch.testing.assert_close(model(**case["batch"]).prediction_outputs, case["expected"])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model()
    batch = inputs(model.config)
    expected = model(**batch).prediction_outputs
    model.to(dtype)
    outputs = model(**{**batch, "past_values": batch["past_values"].to(dtype)}, labels=expected)
    assert outputs.prediction_outputs.dtype == torch.float32
    # 16 consecutive layers, each of which rounds its output
    budget = 16 * torch.finfo(dtype).eps * expected.std() * 2
    assert outputs.loss < budget


def test_compiled():
    model = tiny_model()
    batch = inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).prediction_outputs, model(**batch).prediction_outputs)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("past_values", torch.zeros(3, 5, 7), r"past_values must be \(batch, 5, 6\), got \(3, 5, 7\)"),
            ("past_values", None, "specify past_values"),
            ("past_time_features", torch.zeros(3, 4, 2), "past_time_features must be"),
            ("future_time_features", torch.zeros(2, 4, 2), "future_time_features must be"),
            ("future_time_features", None, "specify future_time_features"),
        ],
    )
    def test_shapes(self, name, value, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            model(**{**inputs(model.config), name: value})
        with pytest.raises(ValueError, match="true values must be"):
            model(**inputs(model.config), labels=torch.zeros(3, 4, 1))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_nodes": 1}, "at least 2"),
            ({"context_length": 0}, "context_length=0 is out of range: it must be at least 1"),
            ({"value_std": 0.0}, "value_std=0.0 is out of range: it must be above 0"),
            ({"group_size": 7}, "between 1 and num_nodes"),
            ({"attention_output_layers": 3}, "must be 1 or 2"),
            ({"sensor_ids": ["a"]}, "1 sensor_ids were passed for num_nodes=6"),
            ({"sensor_ids": ["a", "b", "c", "d", "e", "a"]}, "repeated: a"),
        ],
    )
    def test_configurations(self, fields, message):
        with pytest.raises(Exception, match=message):
            GMANConfig.from_variant("tiny", **fields)

    def test_vectors_of_the_sensors(self):
        model = GMANModel(GMANConfig.from_variant("tiny"))
        with pytest.raises(ValueError, match=r"\(6, 8\), got \(6, 4\)"):
            model.set_spatial_embedding(torch.zeros(6, 4))
        with pytest.raises(ValueError, match="not finite"):
            model.set_spatial_embedding(torch.full((6, 8), torch.nan))
