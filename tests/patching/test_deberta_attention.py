"""Fast attention on transformers' DeBERTa: exact, reversible, and never with an outdated projection."""

import copy
import inspect

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaForTokenClassification,
    DebertaModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
)

from hf_attn import apply_fast_attention, remove_fast_attention
from hf_attn.attention.disentangled import DISENTANGLED
from hf_attn.patching.deberta.attention import FastSelfAttention
from hf_attn.patching.deberta.positions import bucket_of_distance, rows_by_distance


#: in float64; transformers computes the scale of the scores, and the LayerNorms of v1, in float32
EXACT = 1e-6
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
V3 = {**TINY, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
KINDS = {
    "v3": (DebertaV2Model, DebertaV2Config, V3),
    "v2-conv": (DebertaV2Model, DebertaV2Config, {**V3, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "v2-own-projections": (DebertaV2Model, DebertaV2Config, {**V3, "position_buckets": -1, "share_att_key": False}),
    "v2-c2p": (DebertaV2Model, DebertaV2Config, {**V3, "pos_att_type": "c2p"}),
    "v2-no-terms": (DebertaV2Model, DebertaV2Config, {**V3, "pos_att_type": None}),
    "v1": (DebertaModel, DebertaConfig, TINY),
    "v1-p2c": (DebertaModel, DebertaConfig, {**TINY, "pos_att_type": "p2c"}),
    "v1-absolute": (DebertaModel, DebertaConfig, {**TINY, "relative_attention": False, "position_biased_input": True}),
}


def make_model(kind: str = "v3", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model_class, config_class, fields = KINDS[kind]
    model = model_class(config_class(**fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_batch(length: int = 17) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 60, (3, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if length > 4:
        mask[1, -3:], mask[2, :2] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}


def states(model, batch) -> torch.Tensor:
    """Hidden states of real tokens; those of padding are arbitrary."""
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


@pytest.mark.parametrize("kind", KINDS)
def test_all_implementations_equal_transformers(kind):
    model = make_model(kind).double()
    for length in (1, 2, 17, 24):
        batch = make_batch(length)
        with torch.no_grad():
            expected = states(model, batch)
            for implementation in ("eager", "torch", "flex", "auto"):
                apply_fast_attention(model, implementation)
                found = states(model, batch)
                again = states(model, batch)
                remove_fast_attention(model)
                torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)
                assert torch.equal(found, again)


@pytest.mark.parametrize("length", (300, 700))
def test_row_blocks_with_the_published_table(length):
    """Buckets 256 of 512, longer than a block; 700 is beyond the table."""
    torch.manual_seed(0)
    fields = {**V3, "position_buckets": 256, "max_position_embeddings": 512, "num_hidden_layers": 1}
    model = DebertaV2Model(DebertaV2Config(**fields)).eval().double()
    batch = {"input_ids": torch.randint(1, 60, (2, length)), "attention_mask": torch.ones(2, length)}
    batch["attention_mask"][1, 250:] = 0
    with torch.no_grad():
        expected = states(model, batch)
        apply_fast_attention(model, "torch", hf_compat=True)
        torch.testing.assert_close(states(model, batch), expected, atol=EXACT, rtol=0)
        remove_fast_attention(model)
        found = {}
        for implementation in ("eager", "torch"):
            apply_fast_attention(model, implementation)
            found[implementation] = states(model, batch)
            remove_fast_attention(model)
    torch.testing.assert_close(found["torch"], found["eager"], atol=EXACT, rtol=0)
    # transformers lacks the clamp of the official code, which matters only beyond the table
    assert torch.allclose(found["eager"], expected, atol=EXACT) == (length <= 512)


@pytest.mark.parametrize("kind", ("v3", "v2-own-projections", "v1"))
@pytest.mark.parametrize("implementation", ("eager", "torch"))
def test_gradients(kind, implementation):
    model, batch = make_model(kind).double().train(), make_batch()
    weights = torch.randn(int(batch["attention_mask"].sum()), 32, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        (states(model, batch) * weights).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    apply_fast_attention(model, implementation)
    for _ in range(2):
        found = gradients()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6, msg=name)
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("implementation", ("eager", "torch"))
def test_half_precision_is_as_exact_as_transformers(dtype, implementation):
    exact, batch = make_model().double(), make_batch()
    exact.to(dtype)
    model = copy.deepcopy(exact)
    exact.double()
    with torch.no_grad():
        oracle = states(exact, batch)
        budget = (states(model, batch).double() - oracle).abs().max() * 2 + torch.finfo(dtype).eps
        apply_fast_attention(model, implementation)
        assert (states(model, batch).double() - oracle).abs().max() <= budget


# --- the cache of projections ----------------------------------------------------------------------------------------


def cached(model) -> list[int]:
    return [len(m.position_projections) for m in model.modules() if isinstance(m, FastSelfAttention)]


def _step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    states(model, make_batch()).square().sum().backward()
    optimizer.step()
    model.eval()


def _in_place(model):
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key_proj.weight.mul_(1.5)


def _data(model):
    model.encoder.layer[1].attention.self.query_proj.weight.data += 0.1


def _table(model):
    model.encoder.rel_embeddings.weight.data.mul_(-1)


def _norm_of_table(model):
    model.encoder.LayerNorm.bias.data += 0.3


def _replaced(model):
    torch.manual_seed(5)
    model.encoder.layer[0].attention.self.key_proj = torch.nn.Linear(32, 32).eval()


CHANGES = {
    "train": _step,
    "load": lambda model: model.load_state_dict(make_model(seed=3).state_dict()),
    "dtype": lambda model: model.double(),
    "in place": _in_place,
    "data": _data,
    "table": _table,
    "norm of table": _norm_of_table,
    "replaced": _replaced,
    "bias": lambda model: model.encoder.layer[0].attention.self.key_proj.bias.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_invalidate_the_projection(change):
    model, batch = make_model(), make_batch()
    apply_fast_attention(model)
    with torch.no_grad():
        before = states(model, batch)
    assert cached(model) == [2, 2]
    CHANGES[change](model)
    with torch.no_grad():
        after = states(model, batch)
        remove_fast_attention(model)
        expected = states(model, batch)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    if change != "dtype":
        assert not torch.allclose(before, after, atol=1e-3)


def test_cache_is_freed_and_not_copied():
    model, batch = make_model(), make_batch()
    apply_fast_attention(model)
    for free in (lambda: model.train().eval(), lambda: model.load_state_dict(model.state_dict()), model.float):
        with torch.no_grad():
            states(model, batch)
        assert cached(model) == [2, 2]
        free()
        assert cached(model) == [0, 0]
    with torch.inference_mode():
        states(model, batch)
    assert cached(copy.deepcopy(model)) == [0, 0]


def test_device_move_frees_the_cache():
    model = make_model()
    apply_fast_attention(model)
    with torch.no_grad():
        states(model, make_batch())
    model.to("meta")
    assert cached(model) == [0, 0]


def test_nothing_is_cached_where_gradients_are_wanted():
    model, batch = make_model(), make_batch()
    apply_fast_attention(model)
    states(model, batch).sum().backward()
    assert cached(model) == [0, 0]
    assert model.encoder.rel_embeddings.weight.grad.abs().sum() > 0


def test_frozen_model_with_gradients_after_inference_mode():
    model, batch = make_model().requires_grad_(False), make_batch()
    apply_fast_attention(model)
    with torch.inference_mode():
        states(model, batch)
    embeddings = model.embeddings.word_embeddings(batch["input_ids"]).requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state.sum().backward()
    assert cached(model) == [2, 2] and embeddings.grad.abs().sum() > 0


# --- in the ecosystem --------------------------------------------------------------------------------------------------


def test_saved_model_is_an_ordinary_deberta(tmp_path):
    model, batch = make_model(), make_batch()
    names = set(model.state_dict())
    patched = apply_fast_attention(model)
    assert patched == tuple(f"encoder.layer.{i}.attention.self" for i in range(2))
    model.save_pretrained(tmp_path)
    plain = DebertaV2Model.from_pretrained(tmp_path)
    assert set(plain.state_dict()) == names and not cached(plain)
    with torch.no_grad():
        torch.testing.assert_close(states(plain, batch), states(model, batch), atol=1e-5, rtol=1e-5)


def test_attention_weights_and_pair_masks():
    model, input_ids = make_model(), make_batch()["input_ids"]
    of_pairs = torch.ones(3, 17, 17).tril()
    with torch.no_grad():
        expected = model(input_ids, output_attentions=True)
        pairs = model.encoder(model.embeddings(input_ids), of_pairs).last_hidden_state
        apply_fast_attention(model)
        found = model(input_ids, output_attentions=True)
        fast = model.encoder(model.embeddings(input_ids), of_pairs).last_hidden_state
    for weights, wanted in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast, pairs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ("patch", "adapter"))
def test_peft(first):
    peft = pytest.importorskip("peft")
    model, batch = make_model(), make_batch()
    if first == "patch":
        apply_fast_attention(model)
        with torch.no_grad():
            states(model, batch)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query_proj", "key_proj"], init_lora_weights=False)
    )
    adapted.eval()
    if first == "adapter":
        apply_fast_attention(adapted)
    with torch.no_grad():
        fast = states(adapted, batch)
        with adapted.disable_adapter():
            without = states(adapted, batch)
        merged = adapted.merge_and_unload()
        of_merged = states(merged, batch)
        remove_fast_attention(merged)
        expected = states(merged, batch)
    torch.testing.assert_close(fast, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_merged, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_compile():
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        expected = states(model, batch)
        apply_fast_attention(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(states(compiled, batch), expected, atol=1e-5, rtol=1e-5)
        model.encoder.rel_embeddings.weight.mul_(-1)
        torch.testing.assert_close(states(compiled, batch), states(model, batch), atol=1e-5, rtol=1e-5)


def test_onnx_export(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = make_model(), make_batch(9)
    apply_fast_attention(model)
    arguments = (batch["input_ids"], batch["attention_mask"])
    # Beyond the table of positions, distances are clamped, which needs another graph.
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=24)}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        arguments,
        path,
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        verbose=False,
    )
    session = runtime.InferenceSession(path)
    other = make_batch(20)
    found = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})[0]
    with torch.no_grad():
        expected = states(model, other)
    torch.testing.assert_close(torch.from_numpy(found)[other["attention_mask"].bool()], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_class", "config"),
    (
        (DebertaV2ForSequenceClassification, DebertaV2Config(**V3, num_labels=3)),
        (DebertaForTokenClassification, DebertaConfig(**TINY, num_labels=3)),
    ),
)
def test_heads(model_class, config):
    model, batch = model_class(config).eval(), make_batch(8)
    batch["attention_mask"][:] = 1
    with torch.no_grad():
        expected = model(**batch).logits
        apply_fast_attention(model)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_empty_batch():
    model = make_model()
    apply_fast_attention(model)
    with torch.no_grad():
        assert model(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.shape == (0, 5, 32)


# --- positions -----------------------------------------------------------------------------------------------------------


def test_buckets_of_the_published_models():
    distances = torch.arange(-2000, 2001)
    buckets = bucket_of_distance(distances, 256, 512)
    assert torch.equal(buckets, -buckets.flip(0))
    assert buckets.unique().tolist() == list(range(-255, 256))
    known = {131: 131, 200: 169, 300: 207, 400: 233, 510: 255, 511: 255, 1999: 255}
    assert {distance: int(buckets[distance + 2000]) for distance in known} == known
    rows = rows_by_distance(256, 256, 512, False)
    assert rows.min() == 1 and rows.max() == 511


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="BertModel is not a DeBERTa"):
        apply_fast_attention(
            BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        )


def test_patched_twice_and_removed_twice():
    model = make_model()
    apply_fast_attention(model, "torch")
    with pytest.raises(ValueError, match="already"):
        apply_fast_attention(model, "eager")
    remove_fast_attention(model)
    assert type(model.encoder).__module__.startswith("transformers.")
    with pytest.raises(ValueError, match="no fast attention"):
        remove_fast_attention(model)


def test_unknown_implementation_and_missing_package(monkeypatch):
    with pytest.raises(ValueError, match=r"must be one of auto, .*, eager, got"):
        apply_fast_attention(make_model(), "fast")
    monkeypatch.setattr("hf_attn.patching.deberta.patch.is_installed", lambda package: False)
    with pytest.raises(ValueError, match="deberta-cuda"):
        apply_fast_attention(make_model(), "flashdeberta")


def test_unknown_terms_are_refused():
    model = DebertaV2Model(DebertaV2Config(**{**V3, "pos_att_type": "c2p|p2p"}))
    with pytest.raises(ValueError, match="p2p"):
        apply_fast_attention(model)


def test_text_of_length_0():
    model = make_model()
    apply_fast_attention(model)
    ids = torch.zeros(2, 0, dtype=torch.long)
    for arguments in (
        {"input_ids": ids, "attention_mask": torch.ones(2, 0)},
        {"input_ids": ids},
        {"inputs_embeds": torch.zeros(2, 0, 32)},
    ):
        with pytest.raises(ValueError, match="length 0"):
            model(**arguments)
    remove_fast_attention(model)
    assert not model._forward_pre_hooks


def test_pinned_implementation_says_why_not():
    model = make_model().train()
    apply_fast_attention(model, "flex")
    with pytest.raises(ValueError, match="backward pass"):
        model(**make_batch())


@pytest.mark.parametrize("name", ("disentangled_flash", "flashdeberta"))
def test_cuda_packages_refuse_a_cpu(name, monkeypatch):
    monkeypatch.setattr("hf_attn.kernels.disentangled.packages.is_installed", lambda package: True)
    query = torch.zeros(1, 2, 3, 32)
    call = DISENTANGLED.call(query, query, query, rows=torch.zeros(5))
    with pytest.raises(ValueError, match=f"implementation='{name}' does not support this call: .* runs on CUDA"):
        DISENTANGLED(call, name)


def test_signatures_of_the_cuda_packages():
    """Their kernels need a GPU; here only their signatures are compared with the passed arguments."""
    attention = pytest.importorskip("disentangled_flash.training.attention", reason="needs the extra deberta-cuda")
    other = pytest.importorskip("flashdeberta.ops.flash_attention", reason="needs the extra deberta-cuda")
    inspect.signature(attention.training_attention).bind(
        *range(7), score_scale=1.0, has_padding=False, strict_fp32=True, dropout_p=0.0, gradient_band=None
    )
    inspect.signature(other.flash_attention_with_disentangled).bind(
        *range(6), causal=False, sm_scale=1.0, position_buckets=0, max_relative_distance=4
    )
