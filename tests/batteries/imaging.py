"""Tests that every image family inherits, beside transformers' own ([`tests.batteries.upstream`])."""

import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

from hf_attn.architectures.imaging import image_processor_for


RELOAD = """
import sys
from safetensors.torch import load_file, save_file
import hf_attn
from transformers import AutoModelForImageClassification

folder, = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder)
outputs = {f"state.{name}": tensor for name, tensor in model.state_dict().items()}
outputs["logits"] = model(load_file(f"{folder}/inputs.safetensors")["pixel_values"]).logits.detach()
save_file(outputs, f"{folder}/outputs.safetensors")
"""


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set every tensor to random values of ordinary size, so that zeros hide nothing, and switch to eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif tensor.ndim < 2:
                tensor.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model.eval()


class ImageFamilyTests:
    """Tests for every image family.

    Class attributes:
        parameters: published variant -> number of its parameters.
        processors: published variant -> (resized edge, crop, mean, std) of its images.
        fullgraph: whether the family supports `torch.compile(fullgraph=True)`.
    """

    parameters: ClassVar[dict[str, int]] = {}
    processors: ClassVar[dict[str, tuple]] = {}
    fullgraph: ClassVar[bool] = True

    def get_config(self, **overrides):
        """A tiny configuration."""
        raise NotImplementedError

    def get_model(self, **overrides):
        return randomize(AutoModelForImageClassification.from_config(self.get_config(**overrides)))

    def get_pixel_values(self, batch_size: int = 2):
        config = self.get_config()
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch_size, config.num_channels, config.image_size, config.image_size, generator=generator)

    def test_parameters_of_the_published_variants(self):
        config_class = type(self.get_config())
        counts = {}
        for variant in config_class.variants:
            with torch.device("meta"):
                model = AutoModelForImageClassification.from_config(config_class.from_variant(variant))
            counts[variant] = model.num_parameters()
        assert counts == self.parameters

    def test_unknown_variant_lists_the_known_ones(self):
        config_class = type(self.get_config())
        with pytest.raises(ValueError, match=", ".join(config_class.variants)):
            config_class.from_variant("imaginary")

    def test_variant_takes_labels_by_name(self):
        config_class = type(self.get_config())
        config = config_class.from_variant(next(iter(config_class.variants)), id2label={0: "cat", 1: "dog", 2: "emu"})
        assert config.num_labels == 3

    def test_published_variants_know_the_classes_of_imagenet(self):
        config_class = type(self.get_config())
        for variant, fields in config_class.variants.items():
            if fields["num_labels"] != 1000:
                continue
            config = config_class.from_variant(variant)
            assert config.num_labels == 1000 and config.label2id["goldfish, Carassius auratus"] == 1
            assert config.id2label[999].startswith("toilet tissue")
            assert config_class.from_variant(variant, num_labels=3).id2label[0] == "LABEL_0"

    def test_image_processor_of_the_published_variants(self):
        config_class = type(self.get_config())
        found = {}
        for variant in config_class.variants:
            processor = image_processor_for(config_class.from_variant(variant))
            crop = processor.crop_size
            assert crop.height == crop.width and processor.resample == 3
            found[variant] = (
                processor.size.shortest_edge,
                crop.height,
                tuple(processor.image_mean),
                tuple(processor.image_std),
            )
        assert found == self.processors

    def test_saved_folder_serves_auto_classes_and_pipeline(self, tmp_path):
        model = self.get_model()
        model.save_pretrained(tmp_path)
        image_processor_for(model.config).save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
        assert type(AutoModel.from_pretrained(tmp_path)).__name__ == type(model).__name__.replace(
            "ForImageClassification", "Model"
        )
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
        pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
        expected = model(pixel_values).logits.softmax(-1).amax().item()
        best, *_ = pipeline("image-classification", model=str(tmp_path))(image)
        assert best["score"] == pytest.approx(expected, abs=1e-5)

    def test_round_trip_in_a_fresh_process(self, tmp_path):
        model, pixel_values = self.get_model(), self.get_pixel_values()
        model.save_pretrained(tmp_path)
        save_file({"pixel_values": pixel_values}, tmp_path / "inputs.safetensors")
        subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True)
        outputs = load_file(tmp_path / "outputs.safetensors")
        torch.testing.assert_close(outputs.pop("logits"), model(pixel_values).logits)
        state = {f"state.{name}": tensor for name, tensor in model.state_dict().items()}
        assert outputs.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(outputs[name], tensor), name

    def test_label_count_mismatch(self, tmp_path):
        model = self.get_model(num_labels=5)
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
        smaller = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
        assert smaller(self.get_pixel_values()).logits.shape == (2, 3)

    def test_sdpa_agrees_with_eager(self):
        model, pixel_values = self.get_model(), self.get_pixel_values().requires_grad_()
        # The bias of the keys shifts all scores of a query by a constant, so its gradient is only rounding error.
        parameters = [x for name, x in model.named_parameters() if not name.endswith("k_proj.bias")]
        results = []
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            logits = model(pixel_values).logits
            gradient = torch.autograd.grad(logits.pow(2).sum(), [pixel_values, *parameters])
            results.append((logits, *gradient))
        for eager, sdpa in zip(*results, strict=True):
            torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=2e-5 * eager.abs().max().item())

    def test_bfloat16(self):
        model, pixel_values = self.get_model(), self.get_pixel_values()
        expected = model.double()(pixel_values.double()).logits
        logits = model.bfloat16()(pixel_values.bfloat16()).logits
        assert logits.dtype == torch.bfloat16
        # 8 bits of precision; the errors of a few dozen roundings accumulate like a random walk
        assert (logits - expected).abs().max() < 8 * 2**-8 * expected.abs().max()

    def test_gradient_checkpointing_keeps_the_gradients(self):
        model, pixel_values = self.get_model().eval(), self.get_pixel_values()

        def gradients():
            model.zero_grad()
            model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        plain = gradients()
        model.gradient_checkpointing_enable()
        for module in model.modules():
            # Checkpointing is active in training mode only; batch statistics and stochastic depth stay in evaluation mode.
            if hasattr(module, "gradient_checkpointing"):
                module.training = True
        checkpointed = gradients()
        assert plain.keys() == checkpointed.keys() and plain
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_accumulated_gradients_are_those_of_one_batch(self, tmp_path):
        """Whether Trainer divides the loss of a micro-batch depends on flags of the model class."""
        data = [
            {"pixel_values": image, "labels": label}
            for image, label in zip(self.get_pixel_values(batch_size=4), (0, 1, 1, 0), strict=True)
        ]
        steps = []
        for batch_size, accumulation in ((4, 1), (1, 4)):
            model = self.get_model()
            # Dropout and batch statistics would differ between the two.
            model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=1e-2,
                optim="sgd",
                max_grad_norm=1e9,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            Trainer(model=model, args=arguments, train_dataset=data).train()
            steps.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
        largest = max(step.abs().max().item() for step in steps[0].values())
        assert largest > 0
        for name, step in steps[0].items():
            torch.testing.assert_close(steps[1][name], step, rtol=1e-3, atol=1e-4 * largest, msg=name)

    def test_compile(self):
        if not self.fullgraph:
            pytest.skip("the family's forward depends on data")
        model, pixel_values = self.get_model(), self.get_pixel_values()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=1e-4, atol=1e-4)

    def test_lora_finds_its_targets(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = self.get_model()
        expected = model(self.get_pixel_values()).logits
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, modules_to_save=["classifier"]))
        trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert any("lora_" in name for name in trainable) and any("classifier" in name for name in trainable)
        torch.testing.assert_close(adapted.eval()(self.get_pixel_values()).logits, expected)
        adapted(self.get_pixel_values(), labels=torch.tensor([0, 1])).loss.backward()
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(self.get_model(), tmp_path).eval()
        torch.testing.assert_close(again(self.get_pixel_values()).logits, expected)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 64, 64), "batch dimension"),
            ((1, 4, 64, 64), "num_channels=3"),
            ((1, 64, 64, 3), "Channels come first"),
        ],
    )
    def test_pixel_values_of_another_shape(self, shape, message):
        with pytest.raises(ValueError, match=message):
            self.get_model()(torch.zeros(shape))

    def test_no_pixel_values(self):
        with pytest.raises(ValueError, match="pixel_values"):
            self.get_model()()


class ImageBackboneTests:
    """Tests for the backbone of an image family.

    Class attributes:
        strides: stage -> pixels of the image for one position of its feature map.
        has_norms: whether the feature map of a stage goes through a norm that other models of the family do not have.
    """

    strides: ClassVar[dict[str, int]] = {}
    has_norms: ClassVar[bool] = False
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((64, 64), (96, 160), (70, 50))

    def test_feature_maps(self):
        config = self.get_config(out_features=list(self.strides))
        backbone = randomize(AutoBackbone.from_config(config))
        for height, width in self.sizes:
            features = backbone(torch.randn(2, 3, height, width)).feature_maps
            expected = [
                (2, channels, -(-height // stride), -(-width // stride))
                for channels, stride in zip(backbone.channels, self.strides.values(), strict=True)
            ]
            assert [tuple(feature.shape) for feature in features] == expected
            assert all(feature.is_contiguous() for feature in features)

    def test_other_stages_than_it_was_built_for(self):
        first, *_, last = self.strides
        config = self.get_config(out_features=list(self.strides))
        backbone = randomize(AutoBackbone.from_config(config))
        pixel_values = torch.randn(2, 3, 64, 64)
        expected = dict(zip(self.strides, backbone(pixel_values).feature_maps, strict=True))
        backbone.out_features = [last]
        (feature_map,) = backbone(pixel_values).feature_maps
        torch.testing.assert_close(feature_map, expected[last])

        backbone = randomize(AutoBackbone.from_config(self.get_config(out_features=[first])))
        backbone.out_features = [last]
        if self.has_norms:
            with pytest.raises(ValueError, match=rf"built for \['{first}'\] and has no norms for \['{last}'\]"):
                backbone(pixel_values)
        else:
            assert len(backbone(pixel_values).feature_maps) == 1

    def test_takes_the_weights_of_a_classifier(self, tmp_path):
        model = self.get_model()
        model.save_pretrained(tmp_path)
        config = self.get_config(out_features=list(self.strides)[-1:])
        backbone_class = type(AutoBackbone.from_config(config))
        backbone, info = backbone_class.from_pretrained(
            tmp_path, out_features=config.out_features, output_loading_info=True
        )
        kept = backbone.state_dict()
        base = getattr(model, model.base_model_prefix).state_dict()
        shared = kept.keys() & base.keys()
        assert shared and not (info["missing_keys"] & base.keys())
        for name in shared:
            assert torch.equal(kept[name], base[name]), name

    def test_under_upernet(self):
        stages = list(self.strides)[-4:]
        config = UperNetConfig(
            backbone_config=self.get_config(out_features=stages),
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=self.auxiliary_channels,
            auxiliary_channels=8,
            auxiliary_num_convs=1,
            num_labels=3,
        )
        model = UperNetForSemanticSegmentation(config)
        outputs = model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 3, (2, 64, 64)))
        assert outputs.logits.shape == (2, 3, 64, 64)
        outputs.loss.backward()
        missing = [name for name, parameter in model.backbone.named_parameters() if parameter.grad is None]
        assert missing == []
