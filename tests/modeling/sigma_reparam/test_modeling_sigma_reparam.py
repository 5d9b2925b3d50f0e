"""Properties of the vision transformers and the speech block."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_attn.modeling.sigma_reparam.configuration_sigma_reparam import SigmaReparamViTConfig
from hf_attn.modeling.sigma_reparam.modeling_sigma_reparam import (
    SigmaReparamViTForImageClassification,
    SigmaReparamViTModel,
)
from hf_attn.modeling.sigma_reparam.speech import SigmaReparamSpeechBlock
from hf_attn.patching.sigma_reparam import SigmaReparamLayer, fold_sigma_reparam


TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("variant", "overrides", "parameters", "layers"),
    [
        ("vit_base_patch16_224", {}, 86_529_306, 50),
        ("vit_base_patch16_224", {"num_labels": 0}, 85_760_305, 49),
        ("vit_large_patch16_224", {}, 304_226_378, 98),
    ],
)
def test_published_sizes(variant, overrides, parameters, layers):
    with init_empty_weights():
        model = SigmaReparamViTForImageClassification(SigmaReparamViTConfig.from_variant(variant, **overrides))
    assert model.num_parameters() == parameters
    assert sum(isinstance(module, SigmaReparamLayer) for module in model.modules()) == layers
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


@pytest.mark.parametrize("spectral_init", ["preserve", "unit"])
def test_initial_u_and_gamma_belong_to_the_initial_weights(spectral_init):
    torch.manual_seed(0)
    model = SigmaReparamViTModel(SigmaReparamViTConfig(**TINY, spectral_init=spectral_init))
    for name, layer in model.named_modules():
        if isinstance(layer, SigmaReparamLayer):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
            assert layer.spectral_norm()[0].item() == pytest.approx(norm, rel=1e-5), name
            assert layer.gamma.item() == pytest.approx(norm if spectral_init == "preserve" else 1, rel=1e-5), name


def test_patch_embedding_has_an_initial_scale_of_its_own():
    torch.manual_seed(0)
    config = SigmaReparamViTConfig(**{**TINY, "hidden_size": 256}, patch_embedding_init_multiplier=0.125)
    model = SigmaReparamViTModel(config)
    assert model.embeddings.patch_embeddings.projection.weight.std().item() == pytest.approx(0.0025, rel=0.05)
    assert model.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_classifier_of_another_size_is_initialised_again(tmp_path):
    SigmaReparamViTForImageClassification(SigmaReparamViTConfig(**TINY, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        SigmaReparamViTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    model = SigmaReparamViTForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    logits = model(torch.randn(2, 3, 16, 16)).logits
    assert logits.shape == (2, 5) and logits.isfinite().all()


@pytest.mark.parametrize("spectral_init", ["preserve", "unit"])
def test_folded_model_is_equal_and_plain_also_after_loading(spectral_init, tmp_path):
    torch.manual_seed(0)
    model = SigmaReparamViTForImageClassification(SigmaReparamViTConfig(**TINY, spectral_init=spectral_init)).eval()
    with torch.no_grad():  # as after training, where gamma differs from both initialisations
        for module in model.modules():
            if isinstance(module, SigmaReparamLayer):
                module.gamma.uniform_(0.5, 2)
    pixel_values = torch.randn(2, 3, 16, 16)
    before = model(pixel_values).logits
    fold_sigma_reparam(model)
    torch.testing.assert_close(model(pixel_values).logits, before, atol=1e-6, rtol=1e-5)

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not any(isinstance(module, SigmaReparamLayer) for module in loaded.modules())
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.slow
def test_digits_are_learned_without_norms_warm_up_and_weight_decay(tmp_path):
    digits = pytest.importorskip("sklearn.datasets", reason="the digits are in scikit-learn").load_digits()
    pixels = 2 * (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"pixel_values": pixels[index], "labels": int(digits.target[index])} for index in order]
    torch.manual_seed(0)
    config = SigmaReparamViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
        initializer_range=0.1,
        patch_embedding_init_multiplier=5.0,
    )
    trainer = Trainer(
        SigmaReparamViTForImageClassification(config),
        TrainingArguments(
            tmp_path,
            num_train_epochs=15,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            weight_decay=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows[360:],
        eval_dataset=rows[:360],
        compute_metrics=lambda outputs: {
            "accuracy": (outputs.predictions.argmax(-1) == outputs.label_ids).mean().item()
        },
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.85


@pytest.mark.parametrize("projection_groups", [0, 1, 2])
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_speech_block_ignores_padded_keys(projection_groups, norm):
    torch.manual_seed(0)
    block = SigmaReparamSpeechBlock(12, 20, 3, norm=norm, projection_groups=projection_groups, use_bias=True).eval()
    hidden_states, lengths = torch.randn(2, 6, 12), torch.tensor([6, 4])
    output, entropy = block(hidden_states, lengths)
    changed = hidden_states.clone()
    changed[1, 4:] += 1.0
    torch.testing.assert_close(block(changed, lengths)[0][1, :4], output[1, :4])
    assert 0 < entropy.item() < torch.log(torch.tensor(6.0)).item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "both"}, "norm must be"),
        ({"projection_groups": 3}, "projection_groups must be"),
        ({"num_attention_heads": 5}, "must be a multiple"),
    ],
)
def test_speech_block_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SigmaReparamSpeechBlock(**{"hidden_size": 12, "intermediate_size": 8, "num_attention_heads": 3} | arguments)
