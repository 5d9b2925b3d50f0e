"""Attention of answers to images: equal to the maps of eager generation, but from one pass; published heads."""

import copy

import pytest
import torch

from hf_attn.modeling.sd_rpn.first_pass import find_images
from hf_attn.modeling.sd_rpn.labels.answer_attention import (
    RECIPES,
    AttentionRecipe,
    answer_attention,
    attention_recipe,
    average_attention,
)
from hf_attn.modeling.sd_rpn.prompts import encode_prompts, read_prompt

from .tiny import BASES, picture, tiny_base, tiny_processor


RECIPE = AttentionRecipe({1: (0, 3), 2: (2,)}, {0: None}, "llava", 1e-3)


def prompts(base: str) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths with images of different shapes."""
    processor = tiny_processor(base)
    read = [
        read_prompt(processor, question, image)
        for question, image in (("Who?", picture(90, 60)), ("Where is it?", picture(60, 100, seed=1)))
    ]
    return encode_prompts(processor, tiny_base(base).config, read)


def generated(model, inputs, tokens=5):
    output = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=[model.config.image_token_id],
        output_attentions=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.attentions


def eager_means(attentions, heads, rows, sample, is_image):
    """Mean over decoding steps and heads of the maps returned by generation."""
    maps = [
        attentions[step][layer][sample, head, 0, : len(is_image)][is_image]
        for step in range(1, rows + 1)
        for layer, chosen in heads.items()
        for head in (range(4) if chosen is None else chosen)
    ]
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("base", BASES)
def test_equals_the_maps_of_eager_generation(base):
    inputs = prompts(base)
    # A copy, because the attention implementation of the shared model must not change.
    model = copy.deepcopy(tiny_base(base))
    model.set_attn_implementation("eager")
    answers, attentions = generated(model, inputs)
    model.set_attn_implementation("sdpa")
    # The second answer is marked as shorter.
    lengths = (5, 3)
    found = answer_attention(model, inputs, [a[:n] for a, n in zip(answers, lengths, strict=True)], RECIPE)
    images = find_images(model.config, inputs["input_ids"], inputs.get("image_sizes"), inputs.get("image_grid_thw"))
    for i, (attention, image) in enumerate(zip(found, images, strict=True)):
        is_cell = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
        is_cell[image.start : image.start + image.num_cells] = True
        for name in ("grounding", "sink"):
            expected = eager_means(attentions, getattr(RECIPE, name), lengths[i] - 1, i, is_cell)
            torch.testing.assert_close(getattr(attention, name), expected.view(image.grid), atol=1e-6, rtol=0)
    assert found[0].grounding.std() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_no_layer_after_the_one_before_the_last_chosen_runs_and_hooks_are_removed(base):
    model, inputs = tiny_base(base), prompts(base)
    layers = model.get_decoder().layers
    seen = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output, i=i: seen.append(i))
        for i, layer in enumerate(layers)
    ]
    answer_attention(model, inputs, [torch.tensor([9, 8]), torch.tensor([9, 8, 7])], RECIPE)
    assert seen == [0, 1]
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_answers_of_one_token_have_no_rows():
    model, inputs = tiny_base("llava"), prompts("llava")
    none, one = answer_attention(model, inputs, [torch.tensor([9]), torch.tensor([9, 8])], RECIPE)
    assert none is None
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    (same,) = answer_attention(model, alone, [torch.tensor([9, 8])], RECIPE)
    torch.testing.assert_close(one.grounding, same.grounding, atol=1e-6, rtol=0)
    assert answer_attention(model, inputs, [torch.tensor([9])] * 2, RECIPE) == [None, None]


def test_without_sink_layers_there_are_no_sinks():
    recipe = AttentionRecipe({1: (0,)}, {}, "qwen", 1e-2)
    attention, _ = answer_attention(tiny_base("qwen2_5_vl"), prompts("qwen2_5_vl"), [torch.tensor([9, 8])] * 2, recipe)
    assert attention.sink.shape == attention.grounding.shape
    assert not attention.sink.any()


def test_averages_rows_that_count():
    weights = torch.rand(2, 3, 4, 5)
    mean = average_attention([weights[:, :2], weights[:, 2:]], torch.tensor([[True] * 4, [True, True, False, False]]))
    torch.testing.assert_close(mean[0], weights[0].mean((0, 1)))
    torch.testing.assert_close(mean[1], weights[1, :, :2].mean((0, 1)))


def test_recipes_by_the_name_of_the_base():
    assert attention_recipe("llava-hf/llava-1.5-7b-hf").grounding == {14: (13, 24, 26)}
    assert attention_recipe("liuhaotian/llava-v1.5-13b").sink == {16: (17, 22)}
    assert attention_recipe("/models/Qwen2.5-VL-3B-Instruct/", "text") == RECIPES["qwen2.5-vl-3b", "text"]
    counts = [sum(map(len, recipe.grounding.values())) for recipe in RECIPES.values()]
    assert counts == [3, 7, 5, 4, 4, 3]


@pytest.mark.parametrize(
    "name", ["llava-hf/llava-v1.6-vicuna-7b-hf", "Qwen/Qwen2.5-VL-72B-Instruct", "x/llava-1.5-17b"]
)
def test_no_recipe(name):
    with pytest.raises(ValueError, match=r"llava-1\.5-7b, llava-1\.5-13b, qwen2\.5-vl-7b, qwen2\.5-vl-3b"):
        attention_recipe(name)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (AttentionRecipe({9: (0,)}, {}, "llava", 1e-3), "uses layer 9, but the model has 7"),
        (AttentionRecipe({1: (7,)}, {}, "llava", 1e-3), r"heads \(7,\) of layer 1, which has 4"),
    ],
)
def test_recipes_for_larger_models(recipe, message):
    with pytest.raises(ValueError, match=message):
        answer_attention(tiny_base("llava"), prompts("llava"), [torch.tensor([9, 8])] * 2, recipe)


def test_inputs_that_are_wrong():
    model, inputs = tiny_base("llava"), prompts("llava")
    two = [torch.tensor([9, 8])] * 2
    with pytest.raises(ValueError, match=r"one image, got \[0, 0\]"):
        answer_attention(model, {**inputs, "input_ids": inputs["input_ids"] * 0 + 9}, two, RECIPE)
    with pytest.raises(ValueError, match="non-empty answer for each of the 2 prompts"):
        answer_attention(model, inputs, two[:1], RECIPE)
    with pytest.raises(ValueError, match="contains an image token"):
        answer_attention(model, inputs, [two[0], torch.tensor([9, model.config.image_token_id])], RECIPE)
    with pytest.raises(ValueError, match="needs the processor's mm_token_type_ids"):
        qwen = prompts("qwen2_5_vl")
        del qwen["mm_token_type_ids"]
        answer_attention(tiny_base("qwen2_5_vl"), qwen, two, RECIPE)
    with pytest.raises(ValueError, match="rule must be"):
        AttentionRecipe({1: (0,)}, {}, "vit", 1e-3)
    with pytest.raises(ValueError, match="needs heads in each layer"):
        AttentionRecipe({1: ()}, {}, "llava", 1e-3)
    with pytest.raises(ValueError, match="images must be"):
        attention_recipe("llava-1.5-7b", "photo")
