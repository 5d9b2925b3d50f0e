"""The causal LM family of sigmoid attention: properties from the paper, decoding, training, saving."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_attn.attention.interface import uses_attention
from hf_attn.attention.sigmoid import SigmoidCall, sigmoid_attention_eager
from hf_attn.modeling.sigmoid_attention.configuration_sigmoid_attention import SigmoidAttentionConfig
from hf_attn.modeling.sigmoid_attention.modeling_sigmoid_attention import (
    SigmoidAttentionForCausalLM,
    SigmoidAttentionModel,
    SigmoidCrossAttention,
)


POSITIONS = ["alibi", "rope", "sincos", "none"]
VOCAB = 50


def tiny_config(**overrides) -> SigmoidAttentionConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    }
    return SigmoidAttentionConfig(**{**sizes, **overrides})


def tiny_model(attn_implementation: str | None = None, **overrides) -> SigmoidAttentionForCausalLM:
    set_seed(0)
    config = tiny_config(**overrides)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# --- the published models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "total", "without_embedding"),
    [
        ("gala_85m", 110_139_648, 84_973_824),
        ("gala_1b", 1_300_435_968, 1_233_327_104),
        ("gala_7b", 6_610_759_680, 6_476_541_952),
    ],
)
def test_published_parameter_counts(variant, total, without_embedding):
    config = SigmoidAttentionConfig.from_variant(variant)
    with torch.device("meta"):
        model = SigmoidAttentionForCausalLM(config)
    assert model.num_parameters() == total
    assert total - model.get_input_embeddings().weight.numel() == without_embedding
    assert config.sigmoid_bias == -math.log(4096)


def test_the_feed_forward_width_of_published_models_is_8_3_of_the_width():
    for name in SigmoidAttentionConfig.variants:
        config = SigmoidAttentionConfig.from_variant(name)
        assert config.intermediate_size == math.ceil(config.hidden_size * 8 / 3 / 256) * 256


def test_unknown_variant_lists_the_ones_that_exist():
    with pytest.raises(ValueError, match=r"no variant 'gala_3b'.*gala_85m, gala_1b, gala_7b"):
        SigmoidAttentionConfig.from_variant("gala_3b")


def test_a_variant_takes_overrides():
    config = SigmoidAttentionConfig.from_variant("gala_85m", num_hidden_layers=1, max_position_embeddings=2048)
    assert (config.num_hidden_layers, config.hidden_size) == (1, 768)
    assert config.sigmoid_bias == -math.log(2048)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, r"hidden_size \(30\) must be a multiple of num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 is out of range: it must be at least 1"),
        ({"head_dim": 7, "position_embedding_type": "rope"}, "even head_dim, got 7"),
        ({"hidden_size": 33, "head_dim": 8, "position_embedding_type": "sincos"}, "even hidden_size, got 33"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"norm_structure": "postnorm"}, "norm_structure"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


def test_initial_weights_follow_the_fan_in():
    set_seed(0)
    model = SigmoidAttentionForCausalLM(tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    layer = model.model.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight, model.model.embed_tokens.weight):
        assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.03)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(256))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layer_scale_starts_at_its_value():
    model = tiny_model(layer_scale_init_value=1e-4)
    assert torch.equal(model.model.layers[1].mlp_scale.weight, torch.full((32,), 1e-4))


# --- the bias and the weights --------------------------------------------------------------------------------------


def test_zero_logits_with_the_recommended_bias_sum_to_almost_one():
    n = 4096
    query = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    key = torch.zeros(1, 1, n, 4, dtype=torch.float64)
    _, weights = sigmoid_attention_eager(SigmoidCall(query, key, key, scaling=1.0, bias=-math.log(n)))
    assert weights.sum().item() == pytest.approx(n / (n + 1), abs=1e-12)


def test_far_below_zero_the_normalised_weights_are_softmax():
    torch.manual_seed(0)
    # |q . k| / sqrt(head_dim) <= 5
    query, key = (nn.functional.normalize(torch.randn(1, 2, n, 16), dim=-1) * 20**0.5 for n in (5, 9))
    _, weights = sigmoid_attention_eager(SigmoidCall(query, key, key, scaling=0.25, bias=-20.0))
    softmax = (query @ key.transpose(-1, -2) * 0.25).softmax(-1)
    assert (weights / weights.sum(-1, keepdim=True) - softmax).abs().max() < 1e-6


def test_the_bias_depends_on_training_length_only():
    """It does not depend on the current length, the amount of padding or the decoding step."""
    model = tiny_model("eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    for length in (1, 5, 12):
        attentions = model(random_ids(1, length), output_attentions=True).attentions
        diagonal = attentions[0].diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, torch.full_like(diagonal, 1 / (1 + 16)))


def test_outputs_over_keys_add_up():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 8) for n in (3, 10, 10))
    both, first, second = (
        sigmoid_attention_eager(SigmoidCall(query, key[:, :, part], value[:, :, part], scaling=0.3, bias=-1.0))[0]
        for part in (slice(None), slice(0, 6), slice(6, None))
    )
    torch.testing.assert_close(first + second, both, atol=1e-6, rtol=1e-6)


def test_attentions_are_recorded_on_request_and_do_not_change_the_output():
    model = tiny_model()
    ids = random_ids(2, 6)
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [attention.shape for attention in outputs.attentions] == [(2, 4, 6, 6)] * 2
    assert len(outputs.hidden_states) == 3
    assert (outputs.attentions[0].triu(1) == 0).all()
    torch.testing.assert_close(outputs.logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention", "sigmoid_flash", "eager_paged"])
def test_attention_of_another_kind_is_refused(name):
    config = tiny_config()
    with pytest.raises(
        ValueError,
        match=rf"computes sigmoid attention and does not support attn_implementation='{name}'.*sigmoid_eager",
    ):
        SigmoidAttentionForCausalLM._from_config(config, attn_implementation=name)
    model = SigmoidAttentionForCausalLM(tiny_config())
    with pytest.raises(ValueError, match="computes sigmoid attention"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sigmoid"


# --- masks and positions -------------------------------------------------------------------------------------------


def test_it_goes_through_the_attention_interface():
    uses_attention(tiny_model("sigmoid_eager"), "sigmoid_eager")


@pytest.mark.parametrize("position", POSITIONS)
def test_an_export_has_a_free_length_and_operators_of_torch_only(position):
    model, ids = tiny_model(position_embedding_type=position), random_ids(2, 9)
    length = torch.export.Dim("length", min=2, max=100)
    exported = torch.export.export(
        model, (ids,), {"use_cache": False}, dynamic_shapes={"input_ids": {1: length}, "use_cache": None}
    )
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "hf_attn" in name]
    for other in (ids, random_ids(2, 30), random_ids(2, 3)):
        torch.testing.assert_close(exported.module()(other, use_cache=False).logits, model(other).logits)


@pytest.mark.parametrize("position", POSITIONS)
def test_right_padding_changes_nothing(position):
    model = tiny_model(position_embedding_type=position)
    ids = random_ids(2, 7)
    padded = torch.cat((ids, torch.zeros(2, 4, dtype=torch.long)), dim=1)
    mask = (padded != 0).long()
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, :7], model(ids).logits, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_left_padding_changes_nothing(position):
    model = tiny_model(position_embedding_type=position)
    ids = random_ids(2, 7)
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), ids), dim=1)
    mask = (padded != 0).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:, 4:], model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_query_without_keys_attends_to_nothing():
    model = tiny_model(norm_structure="prenorm")
    ids = torch.cat((torch.zeros(1, 2, dtype=torch.long), random_ids(1, 3)), dim=1)
    outputs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model(ids, attention_mask=(ids != 0).long())
    assert torch.equal(outputs[0][:, :2], torch.zeros(1, 2, 32))
    assert (outputs[0][:, 2:] != 0).any()


@pytest.mark.parametrize("position", POSITIONS)
def test_a_later_token_never_changes_an_earlier_output(position):
    model = tiny_model(position_embedding_type=position)
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_positions_matter_except_without_any():
    for position in POSITIONS:
        model = tiny_model(position_embedding_type=position)
        ids = random_ids(1, 6)
        swapped = ids[:, [1, 0, 2, 3, 4, 5]]
        same = torch.allclose(model(ids).logits[:, -1], model(swapped).logits[:, -1], atol=1e-5)
        # Even without positions, a causal model of two layers depends on the order, so the first layer is compared.
        if position != "none":
            assert not same, position
    model = tiny_model(position_embedding_type="none", num_hidden_layers=1)
    torch.testing.assert_close(model(ids).logits[:, -1], model(swapped).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_trailing_padding_is_a_segment_of_its_own():
    model = tiny_model(separate_trailing_padding=True)
    ids = random_ids(2, 8)
    ids[0, 3] = 0
    ids[1, 5:] = 0
    logits = model(ids).logits
    # Tokens, including an interior padding token, are computed as without the padding; the padding as if it were alone.
    torch.testing.assert_close(logits[:1], model(ids[:1, :8]).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits[1:, :5], model(ids[1:, :5]).logits, atol=1e-6, rtol=1e-5)
    alone = model(torch.zeros(1, 3, dtype=torch.long)).logits
    torch.testing.assert_close(logits[1:, 5:], alone, atol=1e-5, rtol=1e-5)
    static = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=12)).logits
    torch.testing.assert_close(static, logits, atol=1e-6, rtol=1e-5)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["sigmoid", "eager"])
@pytest.mark.parametrize("splits", [(1,) * 10, (7, 3), (4, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("position", POSITIONS)
def test_decoding_equals_the_full_forward(position, cache_class, splits, attn_implementation):
    # With a bias of 0, distant keys matter, so a wrong distance would change the result.
    model = tiny_model(attn_implementation, position_embedding_type=position, sigmoid_bias=0.0)
    ids = random_ids(2, 10)
    options = {"max_cache_len": 13} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    with torch.no_grad():
        steps = [model(part, past_key_values=cache).logits for part in ids.split(splits, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_generate_with_left_padding(position, options):
    model = tiny_model(position_embedding_type=position, sigmoid_bias=0.0)
    prompts = [random_ids(1, length, seed=length) for length in (6, 3)]
    generation = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    alone = [model.generate(prompt, **generation)[0, prompt.shape[1] :] for prompt in prompts]

    ids = torch.stack([nn.functional.pad(prompt[0], (6 - prompt.shape[1], 0)) for prompt in prompts])
    together = model.generate(ids, attention_mask=(ids != 0).long(), **generation)[:, 6:]
    assert torch.equal(together, torch.stack(alone))


def test_generate_is_greedy_search_with_the_full_forward():
    model = tiny_model(sigmoid_bias=0.0)
    ids = random_ids(1, 4)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    for implementation in (None, "static"):
        generated = model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=None, cache_implementation=implementation
        )
        assert torch.equal(generated, expected)


# --- training ------------------------------------------------------------------------------------------------------


OPTIONS = [
    {"position_embedding_type": "rope", "norm_structure": "prenorm", "qk_norm": False},
    {"position_embedding_type": "rope", "qk_norm_after_rope": True, "norm_type": "layer_norm"},
    {"position_embedding_type": "alibi", "gated_mlp": False, "hidden_act": "gelu", "mlp_bias": True},
    {"position_embedding_type": "sincos", "layer_scale_init_value": 0.1, "attention_bias": True},
    {"position_embedding_type": "none", "attention_dropout": 0.1, "tie_word_embeddings": False, "head_dim": 6},
    {"attention_log_temperature": 0.5, "num_key_value_heads": 4, "initializer_range": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_trains(options):
    model = tiny_model(**options).train()
    ids = random_ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without_gradient == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_gradient_checkpointing_changes_no_gradient():
    ids = random_ids(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_stays_close_to_float32():
    model = tiny_model()
    ids = random_ids(2, 12)
    with torch.no_grad():
        exact = model(ids).logits
        logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    # a bfloat16 number has 8 significant bits; two layers accumulate a few roundings
    assert (logits.float() - exact).abs().max() < 8 * 2**-8 * exact.abs().max()


def test_training_in_bfloat16_has_finite_gradients():
    model = tiny_model().to(torch.bfloat16).train()
    ids = random_ids(2, 12)
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_training_compiles_into_one_graph(position):
    ids = random_ids(2, 9)
    losses, gradients = [], []
    for compiled in (False, True):
        model = tiny_model(position_embedding_type=position).train()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = function(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_decoding_with_a_static_cache_compiles_into_one_graph(position):
    model = tiny_model(position_embedding_type=position, sigmoid_bias=0.0)
    ids = random_ids(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=13)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        steps = [model(ids[:, :7], past_key_values=cache).logits]
        steps += [compiled(ids[:, [index]], past_key_values=cache).logits for index in (7, 8, 9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_trailing_padding_compiles_into_one_graph():
    model = tiny_model(separate_trailing_padding=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 8)
    for pads in (0, 3):
        ids[1, 8 - pads :] = 0
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


class _Rows(torch.utils.data.Dataset):
    """Rows with different numbers of labels, so that a mean of means differs from the mean over tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(10, seed=index)
        labels = ids.clone()
        labels[: index % 8] = -100
        return {"input_ids": ids, "labels": labels}


def _weights_after_one_step(tmp_path, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / f"{batch}x{accumulation}"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = tiny_model()
    Trainer(model, arguments, train_dataset=_Rows()).train()
    return model.state_dict()


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path):
    start = tiny_model().state_dict()
    whole = _weights_after_one_step(tmp_path, batch=8, accumulation=1)
    parts = _weights_after_one_step(tmp_path, batch=2, accumulation=4)
    for name, weight in whole.items():
        assert not torch.equal(weight, start[name]), name
        torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=1e-4, msg=name)


# --- saving --------------------------------------------------------------------------------------------------------


_RELOAD = """
import sys, torch, hf_attn
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    expected = torch.load(folder + "/expected.pt")
    state = model.state_dict()
    assert state.keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    print(type(model).__name__, model.config._attn_implementation, model.config.sigmoid_bias)
"""


def test_round_trip_through_a_fresh_process(tmp_path):
    folders = []
    for index, options in enumerate(OPTIONS):
        model = tiny_model(**options, sigmoid_bias=-1.25)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = random_ids(2, 9)
        folders.append(str(tmp_path / str(index)))
        model.save_pretrained(folders[-1])
        with torch.no_grad():
            expected = {"state": model.state_dict(), "ids": ids, "logits": model(ids).logits}
        torch.save(expected, folders[-1] + "/expected.pt")
    run = subprocess.run([sys.executable, "-c", _RELOAD, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["SigmoidAttentionForCausalLM sigmoid -1.25"] * len(OPTIONS)


def test_auto_classes_find_the_family(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SigmoidAttentionConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, SigmoidAttentionModel)
    ids = random_ids(1, 5)
    torch.testing.assert_close(
        base(ids).last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1], atol=1e-6, rtol=1e-6
    )


def test_a_dtype_is_kept(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


# --- cross-attention -----------------------------------------------------------------------------------------------


def test_cross_attention_ignores_masked_keys():
    torch.manual_seed(0)
    attention = SigmoidCrossAttention(24, 24, num_heads=3, sigmoid_bias=-math.log(5), qk_norm=True)
    states, key_value_states = torch.randn(2, 4, 24), torch.randn(2, 5, 24)
    output, weights = attention(states, key_value_states)
    assert (output.shape, weights.shape) == ((2, 4, 24), (2, 3, 4, 5))
    longer = torch.cat((key_value_states, torch.randn(2, 2, 24)), dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2)
    masked, weights = attention(states, longer, mask)
    torch.testing.assert_close(masked, output, atol=1e-6, rtol=1e-5)
    assert (weights[..., 5:] == 0).all()


def test_cross_attention_refuses_streams_whose_heads_differ():
    with pytest.raises(ValueError, match=r"query_dim=24, key_value_dim=32 and\s+num_heads=4"):
        SigmoidCrossAttention(24, 32, num_heads=4, sigmoid_bias=0.0)
