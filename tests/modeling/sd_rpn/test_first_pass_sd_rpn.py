"""The first pass: hidden states for the network, the layer at which it stops, and the positions of the images."""

import pytest
import torch

from hf_attn.modeling.sd_rpn.configuration_sd_rpn import SdRpnConfig
from hf_attn.modeling.sd_rpn.first_pass import ImageCells, check_base, find_images, run_first_pass
from hf_attn.modeling.sd_rpn.prompts import encode_prompts, read_prompt

from .tiny import BASES, BRANCH, GRID, picture, tiny_base, tiny_processor, tiny_rpn


def encoded(kind: str) -> dict:
    """A batch of two prompts with images of different shapes and one without an image, padded on the left."""
    processor = tiny_processor(kind)
    given = [("What is this?", picture(100, 60)), ("And this?", picture(50, 90)), ("Hello", None)]
    prompts = [read_prompt(processor, text, image) for text, image in given]
    return encode_prompts(processor, tiny_base(kind).config, prompts)


@pytest.mark.parametrize("kind", BASES)
def test_it_returns_the_inputs_of_the_branch_layer(kind):
    base, inputs = tiny_base(kind), encoded(kind)
    first = run_first_pass(base, BRANCH, **inputs)
    with torch.no_grad():
        expected = base(**inputs, output_hidden_states=True).hidden_states[BRANCH]
    assert torch.equal(first.hidden_states, expected)
    assert first.position_embeddings[0].shape[-2:] == (inputs["input_ids"].shape[1], 8)
    assert [image.row for image in first.images] == [0, 1]
    assert first.image_mask.sum(dim=1).tolist() == [image.num_cells for image in first.images] + [0]
    is_image = inputs["input_ids"] == base.config.image_token_id
    assert is_image[first.image_mask].all()


@pytest.mark.parametrize("kind", BASES)
def test_no_later_layer_runs(kind):
    base, inputs = tiny_base(kind), encoded(kind)
    ran = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output, index=index: ran.append(index))
        for index, layer in enumerate(base.get_decoder().layers)
    ]
    handles.append(base.lm_head.register_forward_hook(lambda *arguments: ran.append("lm_head")))
    run_first_pass(base, BRANCH, **inputs)
    for handle in handles:
        handle.remove()
    assert ran == list(range(BRANCH))


@pytest.mark.parametrize("kind", BASES)
def test_the_base_is_as_before(kind):
    base, inputs = tiny_base(kind), encoded(kind)
    with torch.no_grad():
        before = base(**inputs).logits
        hooks = [list(layer._forward_pre_hooks) for layer in base.get_decoder().layers]
        remembered = getattr(base.model, "rope_deltas", None)
        run_first_pass(base, BRANCH, inputs["input_ids"][2:], attention_mask=inputs["attention_mask"][2:])
        run_first_pass(base, BRANCH, **inputs)
        assert getattr(base.model, "rope_deltas", None) is remembered
        assert torch.equal(base(**inputs).logits, before)
    assert [list(layer._forward_pre_hooks) for layer in base.get_decoder().layers] == hooks


def test_a_failing_pass_leaves_no_hook():
    base = tiny_base("llava")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        run_first_pass(
            base, BRANCH, torch.full((1, GRID**2), base.config.image_token_id), pixel_values=torch.zeros(2, 3, 84, 84)
        )
    assert not any(layer._forward_pre_hooks for layer in base.get_decoder().layers)


def test_maps_are_cut_by_image():
    """Two images in one prompt, of different grids."""
    kind = "qwen2_5_vl"
    processor = tiny_processor(kind)
    prompt = read_prompt(processor, "Which?", [picture(100, 60), picture(50, 90)])
    first = run_first_pass(tiny_base(kind), BRANCH, **encode_prompts(processor, tiny_base(kind).config, [prompt]))
    grids = [image.grid for image in first.images]
    assert len(set(grids)) == 2
    logits = torch.arange(sum(h * w for h, w in grids))[None].float()
    maps = first.maps(logits)
    assert [tuple(roi_map.shape) for roi_map in maps] == grids
    assert torch.equal(torch.cat([roi_map.flatten() for roi_map in maps]), logits[0])


# --- positions of the images ----------------------------------------------------------------------------------------


def llava_ids(*runs: int) -> torch.Tensor:
    token = tiny_base("llava").config.image_token_id
    return torch.tensor([[1, *(part for run in runs for part in [*[token] * run, 50])]])


def test_images_that_follow_each_other_are_told_apart():
    config = tiny_base("llava").config
    cells = GRID**2
    assert find_images(config, llava_ids(2 * cells)) == [
        ImageCells(0, 1, cells, (GRID, GRID)),
        ImageCells(0, 1 + cells, cells, (GRID, GRID)),
    ]


def test_image_tokens_that_make_no_image_are_refused():
    config = tiny_base("llava").config
    with pytest.raises(
        ValueError, match="40 image tokens in the prompts are not a multiple of the 36 tokens of an image"
    ):
        find_images(config, llava_ids(40))
    with pytest.raises(ValueError, match="do not match its images: 18 tokens from position 1 on, for an image of 6x6"):
        find_images(config, llava_ids(18, 18))
    qwen = tiny_base("qwen2_5_vl").config
    grid = torch.tensor([[1, 4, 6]])
    six = torch.tensor([[1] + [qwen.image_token_id] * 6])
    with pytest.raises(ValueError, match="There are 2 images, but the prompts have image tokens for only 1"):
        find_images(qwen, six, image_grid_thw=grid.repeat(2, 1))
    with pytest.raises(ValueError, match="6 tokens from position 1 on, for no image"):
        find_images(qwen, six)


def test_llava_next_needs_text_between_images():
    config = tiny_base("llava_next").config
    token = config.image_token_id
    with pytest.raises(
        ValueError, match=r"1 runs of image tokens .* for 2 images\. Put text between consecutive images"
    ):
        find_images(config, torch.tensor([[1] + [token] * 80]), image_sizes=torch.tensor([[60, 60], [60, 60]]))
    found = find_images(config, torch.tensor([[1] + [token] * 40 + [50]]), image_sizes=torch.tensor([[60, 60]]))
    assert found == [ImageCells(0, 1, 40, (GRID, GRID))]


@pytest.mark.parametrize("kind", BASES)
def test_images_without_image_tokens_are_refused(kind):
    inputs = encoded(kind)
    inputs["input_ids"][inputs["input_ids"] == tiny_base(kind).config.image_token_id] = 50
    with pytest.raises(ValueError, match="There are images, but no image tokens"):
        run_first_pass(tiny_base(kind), BRANCH, **inputs)


def test_positions_of_plain_text_are_not_taken_for_those_of_images():
    inputs = encoded("qwen2_5_vl")
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="needs mm_token_type_ids"):
        run_first_pass(tiny_base("qwen2_5_vl"), BRANCH, **inputs)


# --- the base of a network --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_a_network_knows_its_base(kind):
    check_base(tiny_rpn(kind).config, tiny_base(kind))


@pytest.mark.parametrize(
    "fields", [{"base_num_hidden_layers": 9}, {"hidden_size": 64}, {"base_model_type": "llava_next"}]
)
def test_a_network_for_another_base_is_refused(fields):
    config = SdRpnConfig.from_dict(
        {**tiny_rpn("llava").config.to_dict(), "base_model_name_or_path": "the/base", **fields}
    )
    with pytest.raises(ValueError, match=r"is for a llava.*the/base.*; the base is a llava with 7 layers of width 32"):
        check_base(config, tiny_base("llava"))


def test_questions_stand_behind_the_first_image():
    """Two prompts: one with two images and padding, and one without an image."""
    kind = "qwen2_5_vl"
    processor, config = tiny_processor(kind), tiny_base(kind).config
    given = [("Which?", [picture(60, 60), picture(60, 60)]), ("A longer question?", picture(60, 60)), ("Hello", None)]
    prompts = [read_prompt(processor, text, image) for text, image in given]
    inputs = encode_prompts(processor, config, prompts)
    positions = run_first_pass(tiny_base(kind), BRANCH, **inputs).question_positions()
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != config.image_token_id)
    last = inputs["input_ids"].shape[1] - 1
    for row in range(2):
        start = int((inputs["input_ids"][row] == config.image_token_id).int().argmax())
        expected = [position for position in range(start, last + 1) if is_text[row, position]]
        padding = positions.shape[1] - len(expected)
        assert positions[row].tolist() == [last] * padding + expected
    assert positions[2].tolist() == [last] * positions.shape[1]
