"""Use of a generator in applications: threads, offloading, adapters, chats, thresholds."""

import base64
import copy
import io
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import GenerationConfig, PreTrainedModel

from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator

from .tiny import (
    BASES,
    GREEDY,
    make_generator,
    picture,
    square,
    tokens,
)


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


def test_several_threads_use_one_generator():
    generator = make_generator("llava")
    pictures = [picture(100, 70), picture(60, 90, 1)]

    def answer(index: int):
        found = generator.generate("What?", pictures[index], threshold=-0.9, **GREEDY)[0]
        return found.text, found.images[0].boxes, found.images[0].roi_map.tolist()

    expected = [answer(0), answer(1)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(answer, [0, 1] * 8))
    assert answers == expected * 8


def partly_offloaded(base: PreTrainedModel) -> PreTrainedModel:
    """Offloads the vision tower only, whose weights come first."""
    cpu_offload(getattr(base.model, "visual", None) or base.model.vision_tower, torch.device("cpu"))
    return base


def wholly_offloaded(base: PreTrainedModel) -> PreTrainedModel:
    return cpu_offload(base, torch.device("cpu"))


@pytest.mark.parametrize("offload", [wholly_offloaded, partly_offloaded])
def test_offloaded_base(kind, offload):
    whole = make_generator(kind)
    offloaded = SdRpnGenerator(offload(copy.deepcopy(whole.base)), whole.rpn, whole.processor)
    image = square()
    assert tokens(offloaded, "What?", image, threshold=-0.9) == tokens(whole, "What?", image, threshold=-0.9)


def test_adapters_in_the_base_are_active():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    plain = make_generator("llava")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(plain.base), lora).eval()
    generator = SdRpnGenerator(adapted, plain.rpn, plain.processor)
    image = square()
    found, of_plain = (each.prepare("What?", image, threshold=-0.9).images[0][0] for each in (generator, plain))
    assert (found.roi_map - of_plain.roi_map).abs().max() > 1e-3
    with adapted.disable_adapter():
        found = generator.prepare("What?", image, threshold=-0.9).images[0][0]
    assert torch.equal(found.roi_map, of_plain.roi_map)

    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, which changes the prompt"):
        SdRpnGenerator(peft.get_peft_model(copy.deepcopy(plain.base), tuning), plain.rpn, plain.processor)


def test_generation_config_that_asks_for_a_dictionary():
    generator = make_generator("llava")
    config = GenerationConfig(**GREEDY, return_dict_in_generate=True)
    answer = generator.generate("What?", square(), threshold=-0.9, generation_config=config)
    assert answer[0].text == generator.generate("What?", square(), threshold=-0.9, **GREEDY)[0].text


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_image_urls_of_a_chat(as_dictionary):
    buffer = io.BytesIO()
    square().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    entry = {"type": "image_url", "image_url": {"url": url} if as_dictionary else url}
    chat = [{"role": "user", "content": [entry, {"type": "text", "text": "What?"}]}]
    generator = make_generator("llava")
    assert tokens(generator, chat) == tokens(generator, "What?", square())
    assert chat[0]["content"][0] is entry


@pytest.mark.parametrize("threshold", ["0.1", True, 1.0, float("nan"), [0.1]])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match="threshold must be a number between -1 and 1"):
        make_generator("llava").prepare("What?", square(), threshold=threshold)


@pytest.mark.parametrize("threshold", [np.float32(0.25), torch.tensor(0.25), Fraction(1, 4)])
def test_thresholds_of_other_types(threshold):
    assert make_generator("llava").prepare("What?", square(), threshold=threshold).images[0][0].threshold == 0.25
