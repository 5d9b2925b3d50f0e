"""What every image classification family is held to besides transformers' own tests.

    class TestNiNformer(ImageClassificationTests):
        model_type = "ninformer"

        def get_config(self):
            return NiNformerConfig(image_size=16, ...)
"""

import json
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_attn.catalog import find_family
from hf_attn.imaging import image_processor_for
from hf_attn.registration import load


_LOAD_ELSEWHERE = """
import sys
import hf_attn, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(**load_file(f"{folder}/inputs.safetensors")).logits
state = {name: tensor.clone() for name, tensor in (*model.named_buffers(), *model.state_dict().items())}
save_file(state | {"logits": logits}, f"{folder}/seen.safetensors")
"""


class ImageClassificationTests:
    """The battery; `get_config` gives a tiny configuration with at least 3 labels.

    Class attributes:
        model_type: the family.
        compiles: whether `torch.compile(fullgraph=True)` has to work.
    """

    model_type: ClassVar[str] = ""
    compiles: ClassVar[bool] = True

    def get_config(self):
        """A configuration small enough for a test of a second."""
        raise NotImplementedError

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return AutoModelForImageClassification.from_config(self.get_config()).eval()

    @pytest.fixture
    def pixel_values(self):
        config = self.get_config()
        torch.manual_seed(1)
        return torch.randn(4, config.num_channels, config.image_size, config.image_size)

    def test_auto_classes(self, model):
        _, family = find_family(self.model_type)
        config = AutoConfig.for_model(self.model_type)
        assert type(config) is load(family.config_reference)
        assert type(model) is load(family.model_reference("AutoModelForImageClassification"))
        assert type(AutoModel.from_config(self.get_config())) is load(family.model_reference("AutoModel"))

    def test_round_trip_in_a_fresh_process(self, model, pixel_values, tmp_path):
        """A buffer that is computed when a model is built is lost where it is built on the meta device."""
        model.save_pretrained(tmp_path)
        save_file({"pixel_values": pixel_values}, tmp_path / "inputs.safetensors")
        subprocess.run([sys.executable, "-c", _LOAD_ELSEWHERE, str(tmp_path)], check=True, capture_output=True)
        seen = load_file(tmp_path / "seen.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(seen.pop("logits"), model(pixel_values).logits, rtol=0, atol=1e-6)
        expected = dict((*model.named_buffers(), *model.state_dict().items()))
        assert seen.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(seen[name], tensor), name

    def test_pipeline_and_image_processor(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        image_processor_for(model.config).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
        pixel_values = processor(image, return_tensors="pt").pixel_values
        config = model.config
        assert pixel_values.shape == (1, config.num_channels, config.image_size, config.image_size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        assert (pixel_values * std + mean).min() >= -1e-6
        assert (pixel_values * std + mean).max() <= 1 + 1e-6

        from PIL import Image

        (best,) = pipeline("image-classification", str(tmp_path))(Image.fromarray(image), top_k=1)
        with torch.no_grad():
            scores = model(pixel_values).logits[0].softmax(-1)
        assert best["label"] == config.id2label[int(scores.argmax())]
        assert best["score"] == pytest.approx(scores.max().item(), abs=1e-5)

    def test_bfloat16(self, model, pixel_values):
        with torch.no_grad():
            expected = model(pixel_values).logits
            output = model.to(torch.bfloat16)(pixel_values).logits
        assert output.dtype == torch.bfloat16
        # a few roundings of 2^-8 each, against logits of this size
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())

    def test_compile(self, model, pixel_values):
        if not self.compiles:
            pytest.skip(f"{self.model_type} does not promise fullgraph compilation")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)

    def test_lora_without_naming_modules(self, model, pixel_values, tmp_path):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, modules_to_save=["classifier"]))
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)
        adapted(pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            expected = adapted.eval()(pixel_values).logits
        adapted.save_pretrained(tmp_path)
        torch.manual_seed(0)
        base = AutoModelForImageClassification.from_config(self.get_config()).eval()
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(base, tmp_path)(pixel_values).logits
        torch.testing.assert_close(loaded, expected)

    def test_gradient_accumulation_equals_one_batch(self, pixel_values, tmp_path):
        """What Trainer does with the loss of a micro-batch depends on flags of the model class."""
        data = [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, (0, 1, 2, 1), strict=True)]
        steps = []
        for batch_size, accumulation in ((4, 1), (1, 4)):
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(self.get_config())
            # dropout and statistics of a batch would differ between the two
            model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=1.0,
                optim="sgd",
                max_grad_norm=1e9,
                lr_scheduler_type="constant",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            Trainer(model=model, args=arguments, train_dataset=data).train()
            steps.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        for name, parameter in steps[0].items():
            torch.testing.assert_close(steps[1][name], parameter, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")

    def test_other_number_of_labels(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        labels = model.config.num_labels + 2
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=labels)
        other = AutoModelForImageClassification.from_pretrained(
            tmp_path, num_labels=labels, ignore_mismatched_sizes=True
        )
        assert other.config.num_labels == labels
        assert all(torch.isfinite(parameter).all() for parameter in other.parameters())

    def test_card_and_stub_are_saved(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert type(model).__name__ in card and "image-classification" in card and "$" not in card
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        _, family = find_family(self.model_type)
        assert auto_map.keys() == {"AutoConfig", *family.models}

    def test_bad_images(self, model, pixel_values):
        with pytest.raises(ValueError, match=f"{model.config.num_channels}"):
            model(pixel_values[:, :1].repeat(1, model.config.num_channels + 1, 1, 1))
        with pytest.raises(ValueError, match="shape"):
            model(pixel_values[0])
        with pytest.raises(ValueError, match="pixel_values"):
            model()

    def test_variants(self):
        config_class = type(self.get_config())
        for name in config_class.variants:
            assert config_class.from_variant(name).model_type == self.model_type
        with pytest.raises(ValueError, match=next(iter(config_class.variants), "no variant")):
            config_class.from_variant("huge")
