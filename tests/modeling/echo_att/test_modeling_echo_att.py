"""The EchoAtt family: properties from the paper, bases, decoding, training, saving."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from hf_attn.analysis import AttentionSimilarity
from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM, evenly_shared_layers
from tests.batteries import bases
from tests.batteries.adapters import CAN_ADD_ADAPTERS


SIZES = {**bases.SIZES, "num_hidden_layers": 6, "max_position_embeddings": 64}
VOCAB = SIZES["vocab_size"]
BASES = {
    **bases.BASES,
    "llama3_rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4, "head_dim": 16}),
    "mistral_full": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2_mixed": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
}
TINY_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def make_base(name: str = "llama", **overrides):
    return bases.base_model(*BASES[name], **{**SIZES, **overrides})


def make_student(name: str = "llama", shared_layers=(2, 3, 5), **overrides):
    return EchoAttForCausalLM.from_base(make_base(name), shared_layers=list(shared_layers), **overrides)


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# --- properties from the paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared_layers", "removed"),
    [
        ([2, 3, 4, 5, 7], 23_592_960),
        ([2, 3, 4, 5, 6, 7, 8, 9, 18], 42_467_328),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18], 80_216_064),
    ],
    ids=["23%", "41%", "77%"],
)
def test_parameters_of_tinyllama(shared_layers, removed):
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
        student = EchoAttForCausalLM(EchoAttConfig(**TINY_LLAMA, shared_layers=shared_layers))
    assert base.num_parameters() == 1_100_048_384
    assert base.num_parameters() - student.num_parameters() == removed


def test_published_variants_have_the_published_parameters():
    for name, removed in (("tinyllama_23", 23_592_960), ("tinyllama_41", 42_467_328), ("tinyllama_77", 80_216_064)):
        with torch.device("meta"):
            student = EchoAttForCausalLM(EchoAttConfig.from_variant(name))
        assert student.num_parameters() == 1_100_048_384 - removed
    assert EchoAttConfig.from_variant("tinyllama_77").attention_source == {
        **dict.fromkeys(range(1, 15), 0),
        **dict.fromkeys((16, 17, 18), 15),
    }


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_shared_layers_it_is_the_base(name, implementation):
    base = make_base(name)
    base.set_attn_implementation(implementation)
    student = EchoAttForCausalLM.from_base(base, shared_layers=[])
    assert student.config._attn_implementation == implementation
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, base(ids).logits)
    report = student.base_report
    assert (report.dropped, report.new) == ((), ())
    assert report.kept_parameters == base.num_parameters()


def test_states_before_the_first_shared_layer_are_the_teachers():
    base, student, ids = make_base(), make_student(), random_ids(2, 9)
    for model in (base, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = base(ids, output_hidden_states=True).hidden_states
        states = student(ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(states[layer], expected[layer])
    assert not torch.allclose(states[3], expected[3])


def test_a_shared_layer_has_its_sources_map():
    student = make_student()
    student.set_attn_implementation("eager")
    with torch.no_grad():
        maps = student(random_ids(2, 9), output_attentions=True).attentions
    assert len(maps) == 6
    for layer, source in {2: 1, 3: 1, 5: 4}.items():
        assert torch.equal(maps[layer], maps[source])
    assert not torch.allclose(maps[4], maps[1])


def test_the_states_of_a_shared_layer_change_its_values_only():
    student, ids = make_student(), random_ids(1, 9)
    student.set_attn_implementation("eager")
    with torch.no_grad():
        before = student(ids, output_attentions=True, output_hidden_states=True)
        student.model.layers[2].input_layernorm.weight.mul_(3)
        after = student(ids, output_attentions=True, output_hidden_states=True)
    assert torch.equal(before.attentions[2], after.attentions[2])
    assert not torch.allclose(before.hidden_states[3], after.hidden_states[3])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_shared_layer_trains_the_queries_and_keys_of_its_source(implementation):
    student = make_student(shared_layers=[5])
    student.set_attn_implementation(implementation)
    gradients = []
    for own_values in (True, False):
        student.zero_grad()
        # Without the values of the source, its projections are trained only through layer 5.
        with torch.no_grad():
            if not own_values:
                student.model.layers[4].self_attn.o_proj.weight.zero_()
        student(random_ids(2, 9), labels=random_ids(2, 9)).loss.backward()
        gradients.append(student.model.layers[4].self_attn.q_proj.weight.grad.clone())
    assert gradients[1].abs().max() > 0
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_shared_layers_have_no_queries_and_keys(name):
    student = make_student(name)
    names = {key for key, _ in student.named_parameters()}
    for layer in range(6):
        own = {key.split(".")[4] for key in names if key.startswith(f"model.layers.{layer}.self_attn.")}
        assert bool(own & {"q_proj", "k_proj", "q_norm", "k_norm"}) == (layer not in (2, 3, 5))
    assert all(any(part in key for part in (".q_", ".k_")) for key in student.base_report.dropped)
    dropped = make_base(name).num_parameters() - student.num_parameters()
    assert student.base_report.dropped_parameters == dropped > 0


# --- the two implementations, caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_mixed", "qwen3"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_eager_and_sdpa_agree(name, padding):
    shared = (1, 2, 5) if name == "qwen2_mixed" else (2, 3, 5)
    student, ids = make_student(name, shared).train(), random_ids(3, 9)
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, slice(0, 4) if padding == "left" else slice(5, None)] = 0
    results = {}
    for implementation in ("eager", "sdpa"):
        student.set_attn_implementation(implementation)
        student.zero_grad()
        logits = student(ids, attention_mask=mask).logits[mask.bool()]
        (logits * torch.linspace(-1, 1, VOCAB)).sum().backward()
        results[implementation] = logits, [parameter.grad.clone() for parameter in student.parameters()]
    torch.testing.assert_close(results["sdpa"][0], results["eager"][0], atol=1e-5, rtol=1e-4)
    for ours, expected in zip(results["sdpa"][1], results["eager"][1], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["attends_again", "hands_over_the_map"])
def test_both_ways_to_share_agree(limit, monkeypatch):
    student, ids = make_student().train(), random_ids(2, 12)
    student.set_attn_implementation("eager")
    expected = student(ids).logits
    monkeypatch.setattr("hf_attn.modeling.echo_att.attention.MAX_SHARED_MAP", limit)
    student.set_attn_implementation("sdpa")
    outputs = student(ids, output_attentions=True)
    assert len([weights for weights in outputs.attentions if weights is not None]) == (0 if limit == 0 else 5)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("llama", "mistral", "qwen3") for kind in ("dynamic", "static")),
        # Without a configuration it keeps no window; it does not fit Mistral either.
        ("llama", "without_config"),
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_decoding_equals_the_full_forward(name, implementation, kind):
    student, ids = make_student(name), random_ids(2, 12)
    student.set_attn_implementation(implementation)
    cache = {
        "dynamic": lambda: DynamicCache(config=student.config),
        "without_config": DynamicCache,
        "static": lambda: StaticCache(config=student.config, max_cache_len=16),
    }[kind]()
    with torch.no_grad():
        expected = student(ids).logits
        # A prefill, a chunk, then single tokens.
        pieces = []
        for piece in (ids[:, :5], ids[:, 5:8], *ids[:, 8:].split(1, dim=1)):
            pieces.append(student(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-4)
    for layer, cached in enumerate(cache.layers):
        assert (cached.keys.numel() == 0) == (layer in (2, 3, 5))
        assert cached.values.numel() > 0
        assert cached.get_seq_length() == 12


def test_the_cache_of_shared_layers_can_be_cropped_and_reordered():
    student, ids = make_student(), random_ids(2, 8)
    with torch.no_grad():
        cache = student(ids, use_cache=True).past_key_values
        cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [5] * 6
        cache.reorder_cache(torch.tensor([1, 0]))
        ours = student(ids.flip(0)[:, 5:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(ours, student(ids.flip(0)).logits[:, 5:], atol=1e-5, rtol=1e-4)
        cache.reset()
        assert [layer.get_seq_length() for layer in cache.layers] == [0] * 6


def test_a_static_cache_that_was_initialised_early():
    student, ids = make_student(), random_ids(2, 9)
    cache = StaticCache(config=student.config, max_cache_len=12)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [student(piece, past_key_values=cache).logits for piece in ids.split(4, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), student(ids).logits, atol=1e-5, rtol=1e-4)
    assert [layer.keys.numel() == 0 for layer in cache.layers] == [layer in (2, 3, 5) for layer in range(6)]


def test_a_quantised_cache_keeps_values_of_shared_layers():
    student, ids = make_student(), random_ids(2, 9)
    cache = QuantizedCache("fp8", student.config)
    with torch.no_grad():
        expected = student(ids).logits
        pieces = [student(piece, past_key_values=cache).logits for piece in ids.split(4, dim=1)]
        exact = [student(piece, past_key_values=DynamicCache()).logits for piece in ids[:, :4].split(4, dim=1)]
    torch.testing.assert_close(pieces[0], exact[0], atol=1e-5, rtol=1e-4)
    assert (torch.cat(pieces, dim=1) - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert cache.get_seq_length(2) == 9


def test_a_filled_cache_gives_shared_layers_its_values():
    """As in prefix tuning: keys and values for all layers. The keys of shared layers are not used."""
    student, ids = make_student(), random_ids(2, 9)
    with torch.no_grad():
        prefix = student(ids[:, :4], use_cache=True).past_key_values
        layers = [(layer.keys if layer.keys.numel() else layer.values, layer.values) for layer in prefix.layers]
        cache = DynamicCache(tuple(layers))
        logits = student(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(logits, student(ids).logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_prefix_tuning_trains_the_values_of_shared_layers():
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    student, ids = make_student(), random_ids(2, 9)
    tuned = peft.get_peft_model(student, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    tuned.eval()
    gradient = tuned.prompt_encoder["default"].embedding.weight.grad.view(3, 6, 2, -1)
    has_gradient = (gradient != 0).any(-1).any(0)
    assert has_gradient[:, 1].all()
    assert has_gradient[:, 0].tolist() == [layer not in (2, 3, 5) for layer in range(6)]
    if not CAN_ADD_ADAPTERS:
        pytest.skip(
            "this peft is too old for this transformers: with it a prefix goes wrong in `generate` of any model"
        )
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated, expected = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), ids
    for _ in range(3):
        with torch.no_grad():
            logits = tuned(expected, attention_mask=torch.ones_like(expected)).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generate(implementation):
    student, ids = make_student(), random_ids(2, 7)
    student.set_attn_implementation(implementation)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = ids
    for _ in range(6):
        with torch.no_grad():
            expected = torch.cat([expected, student(expected).logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(ids)
    assert torch.equal(student.generate(ids, attention_mask=mask, **options), expected)
    static = student.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(static, expected)
    for cache in (None, "static"):
        chunked = {"prefill_chunk_size": 3, "cache_implementation": cache, "disable_compile": True}
        assert torch.equal(student.generate(ids, attention_mask=mask, **chunked, **options), expected)
    early_exit = student.generate(ids[:1], attention_mask=mask[:1], assistant_early_exit=3, **options)
    assert torch.equal(early_exit, expected[:1])
    padded_ids = torch.nn.functional.pad(ids, (3, 0))
    padded = student.generate(padded_ids, attention_mask=torch.nn.functional.pad(mask, (3, 0)), **options)
    assert torch.equal(padded[:, 3:], expected)
    beams = [
        student.generate(ids, attention_mask=mask, num_beams=3, use_cache=use_cache, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


# --- training, precision, compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(implementation, reentrant):
    student, ids = make_student().train(), random_ids(2, 9)
    student.set_attn_implementation(implementation)
    student(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    student(ids, labels=ids).loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_is_as_accurate_as_the_base(implementation):
    base, ids = make_base(), random_ids(2, 16)
    base.set_attn_implementation(implementation)
    student = EchoAttForCausalLM.from_base(base, shared_layers=[2, 3, 5])
    with torch.no_grad():
        errors = []
        for model in (student, base):
            exact = model.double()(ids).logits
            errors.append((model.bfloat16()(ids).logits - exact).abs().max().item())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiles_without_graph_breaks(implementation):
    student, ids = make_student(), random_ids(2, 9)
    student.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits
        compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


def test_attention_dropout_is_drawn_for_each_layer():
    student = EchoAttForCausalLM.from_base(make_base(), shared_layers=[2, 3, 5], attention_dropout=0.5).train()
    student.set_attn_implementation("eager")
    ids = random_ids(1, 9)
    maps = student(ids, output_attentions=True).attentions
    for layer, source in {2: 1, 3: 1, 5: 4}.items():
        assert torch.equal(maps[layer], maps[source])
        torch.testing.assert_close(maps[layer].sum(-1), torch.ones(1, 4, 9))
    assert not torch.equal(student(ids).logits, student(ids).logits)


# --- from_base -------------------------------------------------------------------------------------------------------


def test_from_base_takes_a_folder_and_leaves_a_model_alone(tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path)
    from_folder = EchoAttForCausalLM.from_base(tmp_path, shared_layers=[2])
    from_model = EchoAttForCausalLM.from_base(base, shared_layers=[2])
    for name, tensor in from_folder.state_dict().items():
        assert torch.equal(tensor, from_model.state_dict()[name])
    with torch.no_grad():
        for parameter in from_model.parameters():
            parameter.zero_()
    assert base.model.embed_tokens.weight.abs().sum() > 0


def test_number_of_shared_layers():
    base = make_base()
    assert EchoAttForCausalLM.from_base(base, num_shared=2).config.shared_layers == [2, 4]
    similarity = torch.eye(6)
    similarity[2, 3] = similarity[3, 2] = 0.9
    measured = AttentionSimilarity(similarity, 1)
    student = EchoAttForCausalLM.from_base(base, num_shared=1, similarity=measured)
    assert student.config.attention_source == {3: 2}
    with pytest.raises(ValueError, match="model with 4 layers, but this base has 6"):
        EchoAttForCausalLM.from_base(base, num_shared=1, similarity=AttentionSimilarity(torch.eye(4), 1))
    with pytest.raises(ValueError, match="do not pass it with explicit shared_layers"):
        EchoAttForCausalLM.from_base(base, shared_layers=[1], similarity=measured)
    for arguments in ({}, {"shared_layers": [1], "num_shared": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            EchoAttForCausalLM.from_base(base, **arguments)


def test_evenly_shared_layers():
    for num_layers in (2, 5, 12, 22):
        for num_shared in range(num_layers):
            layers = evenly_shared_layers(num_layers, num_shared)
            assert len(layers) == num_shared == len(set(layers))
            assert 0 not in layers
            EchoAttConfig(num_hidden_layers=num_layers, shared_layers=layers)
            if num_shared < num_layers - 2:
                assert num_layers - 1 not in layers
    assert evenly_shared_layers(8, 3) == [2, 4, 6]
    with pytest.raises(ValueError, match="between 0 and 4, got 5"):
        evenly_shared_layers(5, 5)


def test_a_student_can_be_a_base():
    student = make_student(shared_layers=[2, 3])
    again = EchoAttForCausalLM.from_base(student, shared_layers=[2, 3, 5])
    assert again.config.attention_source == {2: 1, 3: 1, 5: 4}
    with pytest.raises(ValueError, match=r"tensors that the base lacks: model.layers.3.self_attn.k_proj.weight"):
        EchoAttForCausalLM.from_base(student, shared_layers=[2])


@pytest.mark.parametrize("as_folder", [True, False])
def test_an_unsupported_base_names_the_supported_ones(as_folder, tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2))
    if as_folder:
        base.save_pretrained(tmp_path)
        base = tmp_path
    with pytest.raises(ValueError, match=r"'gpt2' model. Supported bases: llama, mistral, qwen2, qwen3, echo_att"):
        EchoAttForCausalLM.from_base(base, shared_layers=[1])


def test_a_base_without_a_head_is_refused():
    base = LlamaModel(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"LlamaModel is not a valid base.*lm_head.weight"):
        EchoAttForCausalLM.from_base(base, shared_layers=[])


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_layers": [0]}, r"shared_layers=\[0\] is out of range: each entry must be at least 1"),
        ({"shared_layers": [6]}, r"between 1 and 5.*got \[6\]"),
        ({"shared_layers": [-1]}, r"shared_layers=\[-1\] is out of range"),
        ({"shared_layers": [2, 2]}, r"must not repeat a layer, got \[2, 2\]"),
        ({"shared_layers": [2, 3], "shared_source": [1]}, r"one entry per shared layer \(2\)"),
        ({"shared_layers": [2, 3], "shared_source": [1, 2]}, "layer 2, which has no attention of its own.*1"),
        ({"shared_layers": [2], "shared_source": [3]}, "Layer 2 cannot share with layer 3.*earlier"),
        ({"shared_layers": [2], "shared_source": [2]}, "Layer 2 cannot share with layer 2.*earlier"),
        (
            {
                "shared_layers": [3],
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3,
                "sliding_window": 4,
            },
            r"Layer 3 \(sliding_attention\) cannot share with layer 2 \(full_attention\)",
        ),
    ],
)
def test_impossible_sharing_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        EchoAttConfig(**SIZES, **fields)


def test_sources_can_be_chosen():
    student = make_student(shared_layers=[3, 5], shared_source=[1, 0])
    student.set_attn_implementation("eager")
    with torch.no_grad():
        maps = student(random_ids(1, 7), output_attentions=True).attentions
    assert torch.equal(maps[3], maps[1])
    assert torch.equal(maps[5], maps[0])


# --- saving ----------------------------------------------------------------------------------------------------------


FRESH_PROCESS = """
import json, sys, torch, hf_attn
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder)
torch.save((type(model).__name__, model.state_dict(), model(ids).logits), f"{folder}/reloaded.pt")
"""


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_round_trip_in_a_fresh_process(name, tmp_path):
    student, ids = make_student(name), random_ids(2, 9)
    student.save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), json.dumps(ids.tolist())]
    subprocess.run(command, check=True)
    class_name, state, logits = torch.load(tmp_path / "reloaded.pt")
    assert class_name == "EchoAttForCausalLM"
    assert state.keys() == student.state_dict().keys()
    for key, tensor in student.state_dict().items():
        assert torch.equal(state[key], tensor), key
    with torch.no_grad():
        assert torch.equal(logits, student(ids).logits)


def test_auto_classes(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention_source == {2: 1, 3: 1, 5: 4}
    ids = random_ids(1, 5)
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(states, student.model(ids).last_hidden_state)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_lora_without_target_modules():
    peft = pytest.importorskip("peft", reason="needs the extra hf_attn[peft]")
    model = peft.get_peft_model(make_student(), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert any("layers.2.self_attn.v_proj" in name for name in adapted)
    assert not any("layers.2.self_attn.q_proj" in name for name in adapted)
    assert any("layers.1.self_attn.q_proj" in name for name in adapted)
    ids = random_ids(4, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
