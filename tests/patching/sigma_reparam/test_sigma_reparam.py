"""sigma-reparametrisation of existing models."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_attn.patching.sigma_reparam import (
    SigmaReparamConv2d,
    SigmaReparamLayer,
    SigmaReparamLinear,
    apply_sigma_reparam,
    fold_sigma_reparam,
)
from hf_attn.patching.sigma_reparam.loading import SigmaReparamLoading


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).eval()


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).eval()


def train_a_little(model: nn.Module, input_ids: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        model(input_ids).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def input_ids() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 50, (2, 7))


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_preserving_application_keeps_the_function_and_folding_the_trained_one(make, input_ids):
    model = make()
    before = model(input_ids).logits
    report = apply_sigma_reparam(model)
    assert len(report.converted) >= 14
    torch.testing.assert_close(model(input_ids).logits, before, atol=1e-6, rtol=1e-5)

    train_a_little(model, input_ids)
    trained = model(input_ids).logits
    assert (trained - before).abs().max() > 1e-3
    assert fold_sigma_reparam(model) == report.converted
    torch.testing.assert_close(model(input_ids).logits, trained, atol=1e-6, rtol=1e-5)
    assert not any(isinstance(module, SigmaReparamLayer) for module in model.modules())
    assert {type(model.get_submodule(name)) for name in report.converted} == {nn.Linear}


def test_tied_head_is_left_alone_and_stays_tied():
    model = tiny_llama()
    assert apply_sigma_reparam(model).skipped == {"lm_head": "shares its weight with an embedding"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unit_initialisation_sets_every_spectral_norm_to_one():
    model = tiny_bert()
    report = apply_sigma_reparam(model, init="unit", include=("bert.*",), exclude=("*pooler*",))
    assert not any("pooler" in name or "classifier" in name for name in report.converted)
    for name in report.converted:
        norm = torch.linalg.matrix_norm(model.get_submodule(name).effective_weight(), ord=2)
        assert norm.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_normalised_as_the_matrix_of_its_kernels(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel_size=3, padding=1, groups=groups)
    pixels = torch.randn(2, 4, 5, 5)
    before = layer(pixels)
    apply_sigma_reparam(model := nn.Sequential(layer))
    assert isinstance(layer, SigmaReparamConv2d) and layer.weight.shape == (6, 4 // groups, 3, 3)
    torch.testing.assert_close(model(pixels), before, atol=1e-6, rtol=1e-5)
    norm = torch.linalg.matrix_norm(layer.effective_weight().flatten(1), ord=2)
    assert norm.item() == pytest.approx(layer.gamma.item(), rel=1e-6)


def test_weight_has_no_gradient_along_itself_and_no_scale():
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9)
    inputs = torch.randn(5, 13)
    output = layer.eval()(inputs)
    output.pow(2).sum().backward()
    product = (layer.weight.grad * layer.weight).sum() / (layer.weight.grad.norm() * layer.weight.norm())
    assert abs(product.item()) < 1e-6
    with torch.no_grad():
        layer.weight.mul_(7.5)
    torch.testing.assert_close(layer(inputs), output)


@pytest.mark.parametrize("track_left", [False, True])
@pytest.mark.parametrize("converged", [False, True])
def test_gradients_are_those_of_the_formula(converged, track_left):
    torch.manual_seed(0)
    layer = SigmaReparamLinear(7, 5, track_left=track_left).double().eval()
    if not converged:
        nn.init.normal_(layer.u)
    cotangent = torch.randn(5, 7, dtype=torch.float64)
    (layer.effective_weight() * cotangent).sum().backward()

    weight, gamma = layer.weight.detach().requires_grad_(), layer.gamma.detach().requires_grad_()
    matrix = weight.T if track_left else weight
    with torch.no_grad():
        left = nn.functional.normalize(matrix @ layer.u, dim=0)
        right = nn.functional.normalize(matrix.T @ left, dim=0)
    expected = gamma * weight / (left @ matrix @ right)
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(layer.effective_weight(), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.gamma.grad, gamma.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gamma", [1.7, 0.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])  # the last one has more elements than the weight
def test_layer_is_the_linear_map_of_its_effective_weight(shape, bias, gamma):
    torch.manual_seed(0)
    layer = SigmaReparamLinear(7, 5, bias=bias).double().eval()
    nn.init.normal_(layer.u)
    nn.init.constant_(layer.gamma, gamma)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [inputs, *layer.parameters()]
    cotangent = torch.randn(*shape[:-1], 5, dtype=torch.float64)

    output, expected = layer(inputs), nn.functional.linear(inputs, layer.effective_weight(), layer.bias)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    gradients, expected = (torch.autograd.grad(y, leaves, cotangent) for y in (output, expected))
    torch.testing.assert_close(gradients, expected, atol=1e-12, rtol=1e-12)


def test_frozen_weight_has_no_gradient():
    layer = SigmaReparamLinear(7, 5).requires_grad_(False)
    inputs = torch.randn(2, 7, requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None and all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_layer_trains_and_keeps_its_spectral_norm(dtype):
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9).to(dtype).train()
    layer(torch.randn(2, 13, dtype=dtype)).sum().backward()
    assert layer.weight.grad.dtype == layer.gamma.grad.dtype == dtype
    norm = torch.linalg.matrix_norm(layer.effective_weight().double(), ord=2).item()
    assert norm == pytest.approx(layer.gamma.item(), rel=2 * torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_power_iteration():
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9).eval()
    inputs = torch.randn(2, 13)
    expected = layer.effective_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
        assert torch.equal(layer.effective_weight(), expected)


def test_eval_changes_no_buffer_and_training_moves_u():
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9)
    nn.init.normal_(layer.u)
    u = layer.u.clone()
    layer.eval()(torch.randn(2, 13))
    assert torch.equal(layer.u, u)
    layer.train()(torch.randn(2, 13))
    assert not torch.equal(layer.u, u)


def test_spectral_norm_converges_to_gamma():
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9).train()
    nn.init.normal_(layer.u)
    with torch.no_grad():
        layer.gamma.fill_(2.5)
        for _ in range(200):
            layer.effective_weight()
    assert torch.linalg.matrix_norm(layer.effective_weight(), ord=2).item() == pytest.approx(2.5, rel=1e-6)


def test_statistics_only_computes_the_plain_layer_and_tracks_its_norm():
    torch.manual_seed(0)
    layer = SigmaReparamLinear(13, 9, stats_only=True).train()
    inputs = torch.randn(3, 13)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    norm = torch.linalg.matrix_norm(layer.weight, ord=2)
    assert layer.spectral_norm()[0].item() == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_and_moves_u_once(use_reentrant, input_ids):
    model = tiny_bert()
    apply_sigma_reparam(model)
    for module in model.modules():
        if isinstance(module, SigmaReparamLayer):  # far from convergence, where a second iteration makes a difference
            nn.init.normal_(module.u)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for candidate in (model, checkpointed):
        candidate.train()(input_ids).logits.pow(2).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    for buffer, other in zip(model.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(buffer, other)


@pytest.mark.parametrize(
    ("make", "auto_class"),
    [(tiny_bert, AutoModelForSequenceClassification), (tiny_llama, AutoModelForCausalLM)],
)
def test_from_pretrained_loads_what_was_saved(make, auto_class, input_ids, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "plain")
    apply_sigma_reparam(model)
    train_a_little(model, input_ids)
    model.save_pretrained(tmp_path / "reparametrised")

    loaded, info = auto_class.from_pretrained(tmp_path / "reparametrised", output_loading_info=True)
    assert not any(info.values())
    # Equal weights at other addresses, for which kernels may round differently.
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=1e-6, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name

    fold_sigma_reparam(loaded)
    loaded.save_pretrained(tmp_path / "folded")
    plain = auto_class.from_pretrained(tmp_path / "folded")
    assert not any(isinstance(module, SigmaReparamLayer) for module in plain.modules())
    torch.testing.assert_close(plain(input_ids).logits, model(input_ids).logits)

    applied = auto_class.from_pretrained(tmp_path / "plain", quantization_config=SigmaReparamLoading())
    original = auto_class.from_pretrained(tmp_path / "plain")
    assert any(isinstance(module, SigmaReparamLayer) for module in applied.modules())
    torch.testing.assert_close(applied(input_ids).logits, original(input_ids).logits, atol=1e-6, rtol=1e-5)


def test_compiled_model_trains(input_ids):
    model = tiny_llama()
    apply_sigma_reparam(model)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for candidate in (eager, compiled):
        candidate.train()(input_ids).logits.pow(2).sum().backward()
    for parameter, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


class TestLora:
    peft = pytest.importorskip("peft", reason="adapters need peft")

    @pytest.fixture
    def adapted(self, input_ids):
        model = tiny_llama()
        apply_sigma_reparam(model)
        train_a_little(model, input_ids)
        config = self.peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return self.peft.get_peft_model(model, config).eval()

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merge_adds_to_the_effective_weight(self, adapted, input_ids, safe_merge):
        output = adapted(input_ids).logits
        with adapted.disable_adapter():
            base = adapted(input_ids).logits
        assert (output - base).abs().max() > 1e-3
        merged = adapted.merge_and_unload(safe_merge=safe_merge)
        torch.testing.assert_close(merged(input_ids).logits, output, atol=1e-5, rtol=1e-4)
        assert isinstance(merged.model.layers[0].self_attn.q_proj, SigmaReparamLinear)

    def test_unmerge_takes_it_back(self, adapted, input_ids):
        output = adapted(input_ids).logits
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(input_ids).logits, output, atol=1e-5, rtol=1e-4)


class TestBadInput:
    def test_twice(self):
        model = tiny_bert()
        apply_sigma_reparam(model)
        with pytest.raises(ValueError, match="already reparametrised"):
            apply_sigma_reparam(model)
        fold_sigma_reparam(model)
        with pytest.raises(ValueError, match="nothing to fold"):
            fold_sigma_reparam(model)

    def test_no_linear_layer(self):
        with pytest.raises(ValueError, match="to reparametrise"):
            apply_sigma_reparam(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))

    def test_everything_excluded_says_what_was_skipped(self):
        with pytest.raises(ValueError, match="were skipped"):
            apply_sigma_reparam(tiny_bert(), exclude=("*",))

    def test_zero_weight(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.init.zeros_(model[1].weight)
        with pytest.raises(ValueError, match=r"weights of 1 are all zero.*exclude"):
            apply_sigma_reparam(model)
        assert type(model[0]) is nn.Linear
        apply_sigma_reparam(model, exclude=("1",))

    def test_quantised_weight(self):
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised \(Parameter, torch.int8\)"):
            apply_sigma_reparam(nn.Sequential(layer))

    def test_unknown_initialisation(self):
        with pytest.raises(ValueError, match="init must be 'preserve' or 'unit', got 'svd'"):
            apply_sigma_reparam(tiny_bert(), init="svd")


class TestOtherLibraries:
    """Models of timm and diffusers, which have their own layers and forward passes."""

    @staticmethod
    def check(model: nn.Module, run) -> None:
        with torch.no_grad():
            before = run(model.eval())
            report = apply_sigma_reparam(model)
            torch.testing.assert_close(run(model), before, atol=1e-5, rtol=1e-5)
            for name in report.converted:
                model.get_submodule(name).gamma.mul_(1.1)
            changed = run(model)
            assert (changed - before).abs().max() > 1e-3
            assert fold_sigma_reparam(model) == report.converted
            torch.testing.assert_close(run(model), changed, atol=1e-5, rtol=1e-5)
        assert not any(isinstance(module, SigmaReparamLayer) for module in model.modules())

    def test_timm(self):
        timm = pytest.importorskip("timm", reason="the models of timm need timm")
        torch.manual_seed(0)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
        model = timm.models.vision_transformer.VisionTransformer(**sizes)
        pixels = torch.randn(2, 3, 16, 16)
        self.check(model, lambda model: model(pixels))

    def test_diffusers(self):
        diffusers = pytest.importorskip("diffusers", reason="the models of diffusers need diffusers")
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
        self.check(model, lambda model: model(sample, timestep=3, encoder_hidden_states=text).sample)
