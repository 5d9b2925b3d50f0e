"""The model: combined encoders, outputs, padding, saving, adapters, and bad input."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import BertModel, DeiTModel, ViTConfig, ViTModel, set_seed

from hf_attn import AutoModelForAudioTextClassification, DementiaFusionConfig, DementiaFusionForClassification
from tests.batteries.generation import spread_weights


LABELS = torch.tensor([0, 1, 1])


def tiny_model(**fields) -> DementiaFusionForClassification:
    set_seed(0)
    return spread_weights(DementiaFusionForClassification(DementiaFusionConfig.from_variant("tiny", **fields))).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "input_ids": torch.randint(5, 90, (3, 9), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"context": "deep", "cross": "emd", "fusion": "concat"},
        {"context": "deep-global", "ot_reg": 0.01},
        {"intra": "gate", "gate": "scalar", "cross": "none"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "default",
)
def test_padding_does_not_change_the_logits(inputs, fields):
    model = tiny_model(**fields)
    with torch.no_grad():
        together = model(**inputs).logits[1:2]
        alone = model(inputs["input_ids"][1:2, :4], inputs["pixel_values"][1:2]).logits
        others = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
        same = model(**{**inputs, "input_ids": others}).logits[1:2]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, same, atol=1e-6, rtol=1e-6)
    model.train()(**inputs, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_outputs(inputs):
    model = tiny_model()
    model.set_attn_implementation("eager")
    outputs = model(**inputs, labels=LABELS, output_hidden_states=True, output_attentions=True)
    assert outputs.text_to_image_plan.shape == (3, 9, 5) and outputs.image_to_text_plan.shape == (3, 5, 9)
    torch.testing.assert_close(outputs.text_to_image_plan.sum((1, 2)), torch.ones(3))
    assert not outputs.text_to_image_plan[1, 4:].any()
    torch.testing.assert_close(outputs.fusion_weights.sum(1), torch.ones(3))
    assert [weights.shape for weights in outputs.attentions] == [(3, 2, 9, 9), (3, 2, 5, 5)]
    # Embeddings and two layers; the distillation token is left out.
    assert [states.shape[1] for states in outputs.text_hidden_states] == [9] * 3
    assert [states.shape[1] for states in outputs.image_hidden_states] == [5] * 3
    loss = torch.nn.functional.cross_entropy(outputs.logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(outputs.loss, loss)
    model.head.label_smoothing = 0.0
    plain = torch.nn.functional.cross_entropy(outputs.logits, LABELS)
    torch.testing.assert_close(model(**inputs, labels=LABELS).loss, plain)


def test_pretrained_encoders_are_put_together(inputs, tmp_path):
    config = DementiaFusionConfig.from_variant("tiny")
    set_seed(1)
    text, vision = BertModel(config.text_config), DeiTModel(config.vision_config)
    text.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    for sources in ((tmp_path / "text", tmp_path / "vision"), (text, vision)):
        model = DementiaFusionForClassification.from_text_vision_pretrained(*sources, cross="emd", num_labels=3)
        state = model.dementia_fusion.state_dict()
        for name, encoder in {"text_model": text, "vision_model": vision}.items():
            for key, tensor in encoder.state_dict().items():
                assert key.startswith("pooler.") or torch.equal(state[f"{name}.{key}"], tensor)
        assert model(**inputs).logits.shape == (3, 3) and model.config.cross == "emd" and not model.training


def test_vit_has_no_distillation_token(inputs):
    fields = {**DementiaFusionConfig.tiny["vision_config"], "model_type": "vit"}
    model = DementiaFusionForClassification(DementiaFusionConfig.from_variant("tiny", vision_config=fields))
    assert isinstance(model.dementia_fusion.vision_model, ViTModel)
    assert model(**inputs).text_to_image_plan.shape == (3, 9, 5)


def test_saved_tensors_have_the_names_of_the_model(inputs, tmp_path):
    # Trainer loads the best checkpoint by these names.
    from safetensors.torch import load_file

    model = tiny_model(intra="gate")
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    loaded = AutoModelForAudioTextClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(inputs, dtype):
    model = tiny_model()
    expected = model(**inputs).logits
    found = model.to(dtype)(**inputs, labels=LABELS)
    # Three layers with eight or eleven bits.
    torch.testing.assert_close(found.logits.float(), expected, atol=0.05, rtol=0.05)
    found.loss.backward()


def test_lora_adapts_the_encoders(inputs):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, modules_to_save=["interaction", "head"]))
    model(**inputs, labels=LABELS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert adapted == {"query", "value", "q_proj", "v_proj"}
    assert any("interaction" in name for name in trained) and any("head" in name for name in trained)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"intra": "self"}, "intra must be one of context, gate"),
        ({"num_attention_heads": 3}, "divisible"),
        ({"ot_reg": 0.0}, "ot_reg"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"vision_config": {"model_type": "vit", "hidden_size": 24, "num_attention_heads": 2}}, "same hidden_size"),
    ],
)
def test_configurations_that_make_no_model(fields, problem):
    with pytest.raises((StrictDataclassClassValidationError, StrictDataclassFieldValidationError), match=problem):
        DementiaFusionConfig.from_variant("tiny", **fields)


def test_bad_inputs(inputs):
    model = tiny_model()
    with pytest.raises(ValueError, match="pixel_values"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match="3 transcripts but 2 spectrograms"):
        model(inputs["input_ids"], inputs["pixel_values"][:2])
    with pytest.raises(ValueError, match="batch is empty"):
        model(inputs["input_ids"][:0], inputs["pixel_values"][:0])
    with pytest.raises(ValueError, match="65 tokens"):
        model(torch.ones(1, 65, dtype=torch.long), inputs["pixel_values"][:1])
    with pytest.raises(ValueError, match="no tokens"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0], [1]])})
    with pytest.raises(ValueError, match="contxt"):
        bert = BertModel(model.config.text_config)
        vit = ViTModel(ViTConfig(**{**DementiaFusionConfig.tiny["vision_config"], "model_type": "vit"}))
        DementiaFusionForClassification.from_text_vision_pretrained(bert, vit, contxt="deep")
    with pytest.raises(ValueError, match="two classes"):
        tiny_model(num_labels=1)
