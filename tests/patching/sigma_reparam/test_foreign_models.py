"""sigma-reparametrisation of models and libraries that read, share or compute weights."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaConfig,
    DebertaModel,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

from hf_attn.patching.sigma_reparam import (
    SigmaReparamLayer,
    apply_sigma_reparam,
    bypassed_layers,
    fold_sigma_reparam,
    refresh_sigma_reparam,
)


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
READ = "the model reads its weight without calling it"


def input_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(seed))


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).eval()


def wavlm() -> tuple[nn.Module, tuple]:
    config = WavLMConfig(
        **{name: value for name, value in TINY.items() if name != "vocab_size"},
        conv_dim=(16, 16),
        conv_kernel=(5, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_buckets=8,
    )
    return WavLMModel(config), (torch.linspace(0, 9, 400).sin().view(2, 200),)


def eva() -> tuple[nn.Module, tuple]:
    timm = pytest.importorskip("timm", reason="the models of timm need timm")
    sizes = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("eva02_tiny_patch14_224", **sizes), (torch.randn(1, 3, 28, 28),)


def t5() -> tuple[nn.Module, tuple]:
    """Reads the dtype of the weight of `wo`, and calls the layer."""
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    return model, (input_ids(), None, input_ids(1))


# --- weights that are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "left"), [(wavlm, "q_proj"), (wavlm, "out_proj"), (eva, "qkv"), (t5, None)])
def test_layers_that_a_model_reads_are_left_alone(make, left):
    torch.manual_seed(0)
    model, inputs = make()
    report = apply_sigma_reparam(model.eval())
    read = [name for name, reason in report.skipped.items() if reason == READ]
    assert all(name.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "qkv")) for name in read)
    if left is None:
        assert not read
    else:
        assert any(name.endswith(left) for name in read)
    assert bypassed_layers(model, lambda model: model(*inputs)) == ()
    with torch.no_grad():
        for name in report.converted:
            model.get_submodule(name).gamma.mul_(1.5)
        outputs = [model(*inputs)[0] if make is not eva else model(*inputs)]
        fold_sigma_reparam(model)
        outputs.append(model(*inputs)[0] if make is not eva else model(*inputs))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


class Sly(nn.Module):
    """Reads one weight in a way that is not visible in its source, and another weight in addition to calling its layer."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weights = {name: dict(layer.named_parameters())["weight"] for name, layer in self.named_children()}
        return self.called(states) @ weights["read"] + self.both(states) @ weights["both"]


def test_a_run_finds_what_the_source_does_not_show():
    torch.manual_seed(0)
    model, inputs = Sly().requires_grad_(False), torch.randn(3, 6)
    untouched = copy.deepcopy(model)
    apply_sigma_reparam(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert bypassed_layers(model.train(), lambda model: {"output": (model(inputs),)}) == ("read", "both")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.read.weight.requires_grad

    report = apply_sigma_reparam(untouched, run=lambda model: model(inputs))
    assert report.converted == ("called",) and report.skipped == {"read": READ, "both": READ}
    assert type(untouched.read) is nn.Linear and torch.equal(untouched.read.weight, before["read.weight"])
    with pytest.raises(ValueError, match="No output of the run depends"):
        bypassed_layers(untouched, lambda model: None)
    with pytest.raises(ValueError, match="no reparametrised layer"):
        bypassed_layers(nn.Linear(2, 2), lambda model: None)


@pytest.mark.parametrize("masked", [False, True])
def test_fast_path_of_torchs_encoder_is_closed_until_it_is_folded(masked):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    inputs = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    report = apply_sigma_reparam(model)
    assert "layers.0.linear1" in report.converted
    with torch.no_grad():
        for name in report.converted:
            model.get_submodule(name).gamma.mul_(2)
        fast = model(inputs, src_key_padding_mask=mask)
    slow = model(inputs, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[kept], slow.detach()[kept], atol=1e-5, rtol=1e-5)
    fold_sigma_reparam(model)
    assert model.use_nested_tensor and not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, src_key_padding_mask=mask)[kept], fast[kept], atol=1e-5, rtol=1e-5)


# --- weights that are shared or computed -----------------------------------------------------------------------------


def test_tied_linear_layers_are_left_alone():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    model["b"].weight = model["a"].weight
    report = apply_sigma_reparam(model)
    assert report.converted == ("c",)
    assert report.skipped == {"a": "shares its weight with b", "b": "shares its weight with a"}


def test_layers_tied_later_are_not_folded():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"})
    apply_sigma_reparam(model)
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="a and b share a weight but have different gammas"):
        fold_sigma_reparam(model)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_are_left_alone(wrap):
    model = nn.Sequential(nn.Linear(8, 8), wrap(nn.Linear(8, 8)))
    report = apply_sigma_reparam(model)
    assert report.converted == ("0",)
    assert "weight is computed" in report.skipped["1"] or "Parametrized" in report.skipped["1"]


# --- what comes after a layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 400])  # fewer and more elements than the weight
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_may_be_changed_in_place(tokens, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=bias), nn.ReLU(inplace=True), nn.Linear(64, 64, bias=bias))
    inputs = torch.randn(1, tokens, 64)
    expected = model(inputs)
    apply_sigma_reparam(model)
    output = model(inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_deberta_changes_outputs_in_place():
    config = DebertaConfig(
        **{**TINY, "num_hidden_layers": 1},
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    )
    torch.manual_seed(0)
    model = DebertaModel(config).eval()
    expected = model(input_ids()).last_hidden_state
    apply_sigma_reparam(model)
    torch.testing.assert_close(model(input_ids()).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


# --- u ---------------------------------------------------------------------------------------------------------------


def gradients_of_two_passes(order: str, **checkpointing) -> dict[str, torch.Tensor]:
    """Gradients of the sum of two losses, with two passes from a u far from convergence."""
    model = tiny_llama()
    apply_sigma_reparam(model, init="unit", exclude="lm_head")
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, SigmaReparamLayer):
            nn.init.normal_(layer.u)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    model.train()
    losses = []
    for seed in (0, 1):
        losses.append(model(input_ids(seed), labels=input_ids(seed)).loss)
        if order == "each before the next":
            losses.pop().backward()
    if order == "together":
        sum(losses).backward()
    for loss in losses if order == "first first" else ():
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "layers" in name}


@pytest.mark.parametrize(
    ("order", "use_reentrant", "same_as"),
    [
        ("together", False, "together"),
        ("first first", False, "first first"),
        ("each before the next", False, "each before the next"),
        # Passes without a graph are independent and run one after the other.
        ("together", True, "each before the next"),
        ("each before the next", True, "each before the next"),
    ],
)
def test_several_passes_before_a_backward_pass_with_checkpointing(order, use_reentrant, same_as):
    """Siamese losses, R-drop, SimCLR."""
    checkpointed, plain = gradients_of_two_passes(order, use_reentrant=use_reentrant), gradients_of_two_passes(same_as)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def test_u_moves_on_after_a_backward_pass_and_without_gradients():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(9, 7))
    apply_sigma_reparam(layer)
    layer, inputs = layer[0].train(), torch.randn(2, 9)
    nn.init.normal_(layer.u)

    def u_after(run) -> torch.Tensor:
        run()
        return layer.u.clone()

    waiting = []
    first = u_after(lambda: waiting.append(layer(inputs)))
    assert torch.equal(u_after(lambda: waiting.append(layer(inputs))), first)
    sum(waiting).sum().backward()
    after = u_after(lambda: layer(inputs))
    assert not torch.equal(after, first)
    with torch.no_grad():
        assert not torch.equal(u_after(lambda: layer(inputs)), after)


def test_layer_is_copied_and_pickled_while_a_backward_pass_is_to_come():
    model = nn.Sequential(nn.Linear(4, 4))
    apply_sigma_reparam(model)
    loss = model.train()(torch.randn(2, 4)).sum()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(torch.randn(2, 4)).sum().backward()
        assert other[0].gamma.grad is not None
    loss.backward()


def test_refresh_after_averaging():
    models = [tiny_llama(seed) for seed in (0, 1)]
    for model in models:
        apply_sigma_reparam(model)
    average = models[0]
    with torch.no_grad():
        for tensor, other in zip(average.state_dict().values(), models[1].state_dict().values(), strict=True):
            tensor.lerp_(other, 0.5)
    layer = average.model.layers[0].mlp.up_proj
    exact = torch.linalg.matrix_norm(layer.weight, ord=2)
    assert not torch.allclose(layer.spectral_norm()[0], exact, rtol=1e-4)
    gamma = layer.gamma.clone()
    assert len(refresh_sigma_reparam(average)) == 15
    torch.testing.assert_close(layer.spectral_norm()[0], exact)
    assert torch.equal(layer.gamma, gamma)


# --- saved models in other classes -----------------------------------------------------------------------------------


def test_pre_trained_model_gets_other_heads(tmp_path):
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig(**TINY, initializer_range=0.3)).eval()
    apply_sigma_reparam(masked)
    with torch.no_grad():
        masked.bert.encoder.layer[0].output.dense.gamma.mul_(2)
    masked.save_pretrained(tmp_path / "masked")
    expected = masked.bert(input_ids()).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path / "masked", add_pooling_layer=False)
    torch.testing.assert_close(base(input_ids()).last_hidden_state, expected, atol=1e-6, rtol=1e-5)
    base.save_pretrained(tmp_path / "base")

    for folder in ("masked", "base"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=5, output_loading_info=True
        )
        assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier", "bert"}
        assert all("pooler" in name or "classifier" in name for name in info["missing_keys"])
        assert type(model.classifier) is nn.Linear
        torch.testing.assert_close(model.bert(input_ids()).last_hidden_state, expected, atol=1e-6, rtol=1e-5)
    # The recorded layers are those of the new model.
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(again(input_ids()).logits, model(input_ids()).logits, atol=1e-6, rtol=1e-5)
    head = AutoModelForMaskedLM.from_pretrained(tmp_path / "masked").cls.predictions.transform.dense
    assert isinstance(head, SigmaReparamLayer)


@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
def test_a_head_of_another_size_gets_a_u_of_its_own(auto_class, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(BertConfig(**TINY, num_labels=2))
    apply_sigma_reparam(model)
    # loaded layers keep their u, even if it lags behind the weight
    dense = model.bert.encoder.layer[0].output.dense
    dense.u.copy_(dense.u.roll(1))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_labels = 5
    loaded = auto_class.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    head = loaded.classifier
    torch.testing.assert_close(head.spectral_norm()[0], torch.linalg.matrix_norm(head.weight, ord=2))
    for name, saved in model.bert.named_buffers():
        assert torch.equal(loaded.bert.get_buffer(name), saved), name


def test_model_without_any_of_the_layers(tmp_path):
    model = tiny_llama()
    apply_sigma_reparam(model, include="lm_head")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"LlamaModel has none of its 1 reparametrised layers, such as lm_head.*fold_sigma_reparam"
    ):
        AutoModel.from_pretrained(tmp_path)


# --- quantisers and exporters ----------------------------------------------------------------------------------------


def test_quantisers_say_fold_first(tmp_path):
    model = tiny_llama()
    apply_sigma_reparam(model)
    with pytest.raises(ValueError, match=r"torch\.ao would compute with the weight W.*fold_sigma_reparam"):
        torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with pytest.raises(ValueError, match=r"cannot be quantised \(to Parameter, torch\.int8\).*fold_sigma_reparam"):
        model.lm_head.weight = nn.Parameter(torch.zeros(60, 32, dtype=torch.int8), requires_grad=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantising it with QuantoConfig.*fold_sigma_reparam"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))


def test_quanto_says_fold_first():
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = tiny_llama()
    apply_sigma_reparam(model)
    with pytest.raises(ValueError, match=r"quanto would compute with the weight W.*fold_sigma_reparam"):
        quanto.quantize(model, weights=quanto.qint8)


def test_torchao_says_fold_first():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny_llama()
    apply_sigma_reparam(model)
    with pytest.raises(ValueError, match=r"cannot be quantised.*fold_sigma_reparam"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("axis", [0, 1])
def test_export_with_free_sizes(axis):
    model = tiny_llama()
    apply_sigma_reparam(model)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    shapes = {"ids": {axis: torch.export.Dim("n")}}
    example = torch.arange(16).view(2, 8)
    exported = torch.export.export(Logits(), (example,), dynamic_shapes=shapes, strict=False).module()
    for size in (3, 11, 40):
        ids = torch.arange(60).repeat(8).view(-1)[: size * 8].view((size, 8) if axis == 0 else (8, size))
        ids = ids if axis == 0 else ids[:2]
        torch.testing.assert_close(exported(ids), model(ids).logits, atol=1e-4, rtol=1e-4)
