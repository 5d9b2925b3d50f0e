"""Two-pass answers."""

import base64
import io

import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer, set_seed

from hf_attn.modeling.sd_rpn import generation as generation_sd_rpn
from hf_attn.modeling.sd_rpn.first_pass import run_first_pass
from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnOutput
from hf_attn.modeling.sd_rpn.prompts import encode_prompts, pad_to_square, read_prompt

from .tiny import (
    BASES,
    BRANCH,
    GREEDY,
    GRID,
    IMAGE_SIZE,
    LAYERS,
    NONE,
    ONE,
    SEVERAL,
    force_maps,
    make_generator,
    picture,
    plain_tokens,
    prompt_length,
    square,
    tiny_base,
    tiny_processor,
    tiny_rpn,
    token_id,
    tokens,
)


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


# --- inputs of the second pass -------------------------------------------------------------------------------------


def test_without_a_region_the_answer_is_that_of_the_base(kind):
    image = square()
    generator = make_generator(kind, NONE)
    focused = generator.prepare("What?", image, threshold=0.4)
    assert focused.model_inputs["input_ids"].shape[1] == prompt_length(kind, "What?", image)
    assert focused.images[0][0].boxes == [] and focused.images[0][0].num_crop_tokens == 0
    assert tokens(generator, "What?", image) == plain_tokens(kind, ["What?"], [image])


def test_one_region_adds_exactly_the_tokens_of_its_crop(kind):
    image = square()
    focused = make_generator(kind, ONE).prepare("What?", image, threshold=0.4)
    found = focused.images[0][0]
    if kind == "qwen2_5_vl":
        (binary,) = (region.binary for region in found.regions)
        assert binary.all()
        # The crop is enlarged to the minimum size of the image processor, and is enclosed by two special tokens.
        rows = tiny_processor(kind).image_processor(images=found.crops[0])["image_grid_thw"][0]
        added = int(rows.prod()) // 4
        assert found.num_crop_tokens == added
        added += 2
    else:
        added = GRID**2
        assert found.num_crop_tokens == added
    assert focused.model_inputs["input_ids"].shape[1] == prompt_length(kind, "What?", image) + added
    assert found.boxes == [(2 * 28, 2 * 28, 4 * 28, 4 * 28)]
    assert found.crops[0].size == (2 * 28, 2 * 28)


def test_of_several_regions_only_tokens_inside_are_added(kind):
    image = square()
    focused = make_generator(kind, SEVERAL).prepare("What?", image, threshold=0.2)
    found = focused.images[0][0]
    (region,) = found.regions
    assert not region.binary.all()
    grid = (GRID, GRID)
    if kind == "qwen2_5_vl":
        _, rows, columns = tiny_processor(kind).image_processor(images=found.crops[0])["image_grid_thw"][0].tolist()
        grid = (rows // 2, columns // 2)
    assert 0 < found.num_crop_tokens < grid[0] * grid[1]
    assert found.num_crop_tokens == int(region.kept_tokens(grid).sum())
    extra = 2 if kind == "qwen2_5_vl" else 0
    length = prompt_length(kind, "What?", image) + found.num_crop_tokens + extra
    assert focused.model_inputs["input_ids"].shape[1] == length


def test_llava_answers_as_to_two_images():
    """With one region the second pass is a plain call with image and crop side by side."""
    image = square()
    generator = make_generator("llava", ONE)
    crop = generator.prepare("What?", image, threshold=0.4).images[0][0].crops[0]
    resized = crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    expected = plain_tokens("llava", ["user: <image><image>What?\nassistant: "], [[image, resized]])
    assert tokens(generator, "user: <image>What?\nassistant: ", image) == expected


def test_qwen_answers_as_to_two_images():
    """With all tokens of the crop, the positions are those that the base computes."""
    image = square()
    generator = make_generator("qwen2_5_vl", ONE)
    crop = generator.prepare("What?", image, threshold=0.4).images[0][0].crops[0]
    start, pad, end = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
    expected = plain_tokens("qwen2_5_vl", [f"{start}{pad}{start}{pad}{end}{end}What?"], [[image, crop]])
    assert tokens(generator, f"{start}{pad}{end}What?", image) == expected


def test_qwen_s_positions_are_those_of_the_whole_crop():
    """Dropped tokens leave gaps in the positions, and the text continues after the whole crop."""
    image = square()
    generator = make_generator("qwen2_5_vl", SEVERAL)
    focused = generator.prepare("What?", image, threshold=0.2)
    inputs, found = focused.model_inputs, focused.images[0][0]
    rows, columns = (
        n // 2
        for n in tiny_processor("qwen2_5_vl").image_processor(images=found.crops[0])["image_grid_thw"][0, 1:].tolist()
    )
    ids, positions = inputs["input_ids"][0], inputs["position_ids"][:, 0]
    starts = (ids == token_id("<|vision_start|>")).nonzero()[:, 0]
    first = int(starts[1]) + 1
    kept = found.regions[0].kept_tokens((rows, columns)).nonzero()[:, 0]
    begin = positions[1, first - 1] + 1
    assert torch.equal(positions[2, first : first + len(kept)], begin + kept // columns)
    assert torch.equal(positions[3, first : first + len(kept)], begin + kept % columns)
    assert positions[1, first + len(kept)] == begin + max(rows, columns)
    assert torch.equal(positions[0], torch.arange(len(ids)))


def hardly_looking(generator: SdRpnGenerator) -> SdRpnGenerator:
    """With probabilities that are close to zero for many tokens, for every query."""
    generator.rpn.register_forward_hook(lambda rpn, arguments, output: SdRpnOutput(logits=output.logits * 3 - 15))
    return generator


def test_qwen_reads_again_what_the_question_looks_at(monkeypatch):
    """For a large image; the kept tokens have their positions among all tokens."""
    generator = hardly_looking(make_generator("qwen2_5_vl"))
    read = read_prompt(generator.processor, "What?", square())
    first = run_first_pass(
        generator.base, BRANCH, **encode_prompts(generator.processor, generator.base.config, [read])
    )
    (image,) = first.images
    end = image.start + image.num_tokens
    with torch.no_grad():
        by_query = [
            generator.rpn(**first.rpn_inputs(), query_positions=torch.tensor([position])).logits[0]
            for position in range(end, first.hidden_states.shape[1])
        ]
    asked = torch.stack(by_query).amax(0).sigmoid() > 0.01
    assert 0 < int(asked.sum()) < len(asked)

    whole = generator.prepare("What?", square(), threshold=-0.5)
    monkeypatch.setattr(generation_sd_rpn, "UNASKED_LEFT_OUT_ABOVE", len(asked))
    at_the_limit = generator.prepare("What?", square(), threshold=-0.5).model_inputs
    monkeypatch.setattr(generation_sd_rpn, "UNASKED_LEFT_OUT_ABOVE", len(asked) - 1)
    left_out = generator.prepare("What?", square(), threshold=-0.5)

    for name in ("input_ids", "position_ids"):
        assert torch.equal(at_the_limit[name], whole.model_inputs[name])
    torch.testing.assert_close(left_out.images[0][0].roi_map, whole.images[0][0].roi_map)
    assert left_out.images[0][0].boxes == whole.images[0][0].boxes != []
    kept = torch.ones(whole.model_inputs["input_ids"].shape[1], dtype=torch.bool)
    kept[image.start : end] = asked
    inputs = left_out.model_inputs
    assert torch.equal(inputs["input_ids"], whole.model_inputs["input_ids"][:, kept])
    assert torch.equal(inputs["position_ids"][1:], whole.model_inputs["position_ids"][1:, :, kept])
    assert torch.equal(inputs["position_ids"][0, 0], torch.arange(int(kept.sum())))
    (all_tokens, crop), (stayed, same_crop) = (
        focused.model_inputs["mm_encoder_outputs"]["image"].pooler_output for focused in (whole, left_out)
    )
    assert torch.equal(stayed, all_tokens[asked]) and torch.equal(same_crop, crop)
    assert generator.base.generate(**inputs, **GREEDY).shape[1] == int(kept.sum()) + GREEDY["max_new_tokens"]


def test_without_a_crop_a_large_image_is_read_as_a_whole(monkeypatch):
    monkeypatch.setattr(generation_sd_rpn, "UNASKED_LEFT_OUT_ABOVE", 1)
    expected = plain_tokens("qwen2_5_vl", ["What?"], [square()])
    assert tokens(make_generator("qwen2_5_vl", NONE), "What?", square()) == expected
    focused = make_generator("qwen2_5_vl", ONE).prepare("What?", square(), threshold=0.4)
    assert len(focused.model_inputs["mm_encoder_outputs"]["image"].pooler_output[0]) == 4


def test_a_batch_with_large_images_answers_as_its_prompts_alone(monkeypatch):
    """Two images in a prompt, the second of which is small, and prompts of different lengths."""
    monkeypatch.setattr(generation_sd_rpn, "UNASKED_LEFT_OUT_ABOVE", 20)
    generator = hardly_looking(make_generator("qwen2_5_vl"))
    prompts = ["Do they differ?", "What?", "Hello"]
    images = [[square(0), picture(112, 112)], square(1), None]
    together = tokens(generator, prompts, images, threshold=-0.5)
    alone = [tokens(generator, *one, threshold=-0.5)[0] for one in zip(prompts, images, strict=True)]
    assert together == alone
    features = generator.prepare(prompts, images, threshold=-0.5).model_inputs["mm_encoder_outputs"]["image"]
    sizes = [len(tensor) for tensor in features.pooler_output[::2]]
    assert sizes[0] < GRID**2 and sizes[1] == 16 and sizes[2] < GRID**2


def test_llava_reads_every_token_of_a_large_image(monkeypatch):
    monkeypatch.setattr(generation_sd_rpn, "UNASKED_LEFT_OUT_ABOVE", 1)
    focused = hardly_looking(make_generator("llava")).prepare("What?", square(), threshold=-0.5)
    assert len(focused.model_inputs["mm_encoder_outputs"]["image"].pooler_output[0]) == GRID**2


def test_features_of_the_kept_tokens_enter(kind):
    generator = make_generator(kind, SEVERAL)
    focused = generator.prepare("What?", square(), threshold=0.2)
    image, crop = focused.model_inputs["mm_encoder_outputs"]["image"].pooler_output
    assert len(crop) == focused.images[0][0].num_crop_tokens
    ids = focused.model_inputs["input_ids"]
    assert int((ids == generator.base.config.image_token_id).sum()) == len(image) + len(crop)


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_answers_as_its_prompts_alone(kind):
    """Crops of different numbers of tokens, a prompt without a region and one without an image."""
    prompts = ["What?", "A longer question about this?", "Hello there", "Who?"]
    images = [square(0), square(1), None, square(2)]
    regions = [ONE, NONE, SEVERAL]
    together = tokens(make_generator(kind, *regions), prompts, images, threshold=0.2)
    alone = []
    for prompt, image in zip(prompts, images, strict=True):
        generator = make_generator(kind) if image is None else make_generator(kind, regions.pop(0))
        alone += tokens(generator, prompt, image, threshold=0.2)
    assert together == alone


def test_the_network_sees_a_batch_as_it_sees_prompts_alone(kind):
    generator = make_generator(kind)
    prompts, images = ["What?", "A longer question about this?"], [picture(100, 60), picture(60, 120)]
    together = generator.prepare(prompts, images).images
    for index in range(2):
        (alone,) = generator.prepare(prompts[index], images[index]).images
        torch.testing.assert_close(together[index][0].roi_map, alone[0].roi_map, atol=1e-4, rtol=1e-4)


def test_a_batch_without_images_is_answered_by_the_base(kind):
    prompts = ["Hello", "Hello again"]
    assert tokens(make_generator(kind), prompts) == plain_tokens(kind, prompts, [None, None])


def test_several_images_in_a_prompt(kind):
    if kind == "llava_next":
        prompt = "<image> and <image> differ?"
    else:
        prompt = "Do they differ?"
    generator = make_generator(kind, ONE, NONE)
    (answer,) = generator.generate([prompt], [[square(0), square(1)]], threshold=0.4, **GREEDY)
    assert [len(image.boxes) for image in answer.images] == [1, 0]


# --- the base and its layers ---------------------------------------------------------------------------------------


def test_pass_one_runs_the_layers_up_to_the_branch_and_those_of_the_network(kind):
    generator = make_generator(kind)
    ran = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output, name=name: ran.append(name))
        for module, name in ((generator.base.get_decoder(), "base"), (generator.rpn, "rpn"))
        for layer in module.layers
    ]
    generator.prepare("What?", square())
    for handle in handles:
        handle.remove()
    assert ran == ["base"] * BRANCH + ["rpn"] * (LAYERS - 1)


def test_the_base_is_not_changed(kind):
    before = {name: tensor.clone() for name, tensor in tiny_base(kind).state_dict().items()}
    plain = plain_tokens(kind, ["What?"], [square()])
    make_generator(kind, ONE).generate("What?", square(), threshold=0.4, **GREEDY)
    assert plain_tokens(kind, ["What?"], [square()]) == plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_base(kind).state_dict().items())


def test_a_network_in_another_dtype(kind):
    generator = make_generator(kind)
    expected = generator.prepare("What?", square()).images[0][0].roi_map
    generator.rpn.to(torch.bfloat16)
    roi_map = generator.prepare("What?", square()).images[0][0].roi_map
    assert roi_map.dtype == torch.float32
    assert (roi_map - expected).abs().max() < 0.2


def test_a_network_for_another_base_is_refused():
    with pytest.raises(ValueError, match=r"is for a llava .*; the base is a qwen2_5_vl"):
        SdRpnGenerator(tiny_base("qwen2_5_vl"), tiny_rpn("llava"), tiny_processor("qwen2_5_vl"))


# --- generate ------------------------------------------------------------------------------------------------------


def test_keyword_arguments_of_generate(kind):
    """Without a region the result is that of the base, also with beams and several answers per prompt."""
    prompts, images = ["What?", "Hello"], [square(), None]
    generator = make_generator(kind, NONE)
    for options in ({"num_beams": 3}, {"repetition_penalty": 5.0}, {"num_beams": 2, "num_return_sequences": 2}):
        assert tokens(generator, prompts, images, **options) == plain_tokens(kind, prompts, images, **options)
    set_seed(0)
    sampled = tokens(generator, prompts, images, do_sample=True)
    set_seed(0)
    assert sampled == plain_tokens(kind, prompts, images, do_sample=True)


def test_several_answers_per_prompt(kind):
    generator = make_generator(kind, ONE)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    answers = generator.generate(["What?", "Hello"], [square(), None], threshold=0.4, **options)
    assert [len(answer.texts) for answer in answers] == [2, 2]
    assert [len(answer.images) for answer in answers] == [1, 0]
    assert answers[0].text == answers[0].texts[0]


def test_streaming(kind):
    generator = make_generator(kind, ONE)
    streamer = TextIteratorStreamer(generator.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = generator.generate("What?", square(), threshold=0.4, streamer=streamer, **GREEDY)
    assert "".join(streamer) == answer.text


def test_thresholds(kind):
    generator = make_generator(kind)
    generator.rpn.config.thresholds = {"default": 0.3, "textvqa": 0.2}
    assert generator.prepare("What?", square()).images[0][0].threshold == 0.3
    assert generator.prepare("What?", square(), task="textvqa").images[0][0].threshold == 0.2
    assert generator.prepare("What?", square(), threshold=-0.5).images[0][0].threshold == -0.5
    with pytest.raises(ValueError, match="pass either task or threshold"):
        generator.prepare("What?", square(), task="textvqa", threshold=0.1)
    with pytest.raises(ValueError, match=r"between -1 and 1 .* got 15"):
        generator.prepare("What?", square(), threshold=15)
    with pytest.raises(ValueError, match="no threshold for the task 'chess'"):
        generator.prepare("What?", square(), task="chess")


# --- prompts and images --------------------------------------------------------------------------------------------


def test_a_question_and_a_chat_are_the_same_prompt(kind, tmp_path):
    generator = make_generator(kind, ONE)
    image = square()
    path = tmp_path / "image.png"
    image.save(path)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()

    def chat(**entry):
        return [{"role": "user", "content": [{"type": "image", **entry}, {"type": "text", "text": "What?"}]}]

    placeholder = generator.processor.image_token
    if kind == "qwen2_5_vl":
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    expected = tokens(generator, "What?", image)
    ways = [
        (chat(image=image), None),
        (chat(url=str(path)), None),
        (chat(path=str(path)), None),
        (chat(), image),
        ("What?", path),
        ("What?", str(path)),
        ("What?", encoded),
        (f"user: {placeholder}What?\nassistant: ", image),
    ]
    for prompt, given in ways:
        assert tokens(generator, prompt, given) == expected


def test_an_answer_that_has_begun_is_continued(kind):
    generator = make_generator(kind, ONE)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": square()}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is"}]},
    ]
    focused = generator.prepare(messages, threshold=0.4)
    text = generator.processor.tokenizer.decode(focused.model_inputs["input_ids"][0])
    assert text.rstrip().endswith("assistant: It is")


def test_the_processor_s_start_token_is_not_doubled(kind):
    processor = tiny_processor(kind)
    processor.chat_template = "<s>" + processor.chat_template
    read = read_prompt(processor, "What?", square())
    ids = encode_prompts(processor, tiny_base(kind).config, [read])["input_ids"][0]
    assert int((ids == 1).sum()) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (5, 7), (640, 480), (33, 31)])
def test_images_of_any_size(kind, size):
    generator = make_generator(kind)
    (answer,) = generator.generate("What?", picture(*size), threshold=-0.9, **GREEDY)
    found = answer.images[0]
    for (x0, y0, x1, y1), crop in zip(found.boxes, found.crops, strict=True):
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
        assert crop.size == (x1 - x0, y1 - y0)
    assert found.overlay().size == size


def test_images_of_other_modes_and_orientations(kind):
    generator = make_generator(kind)
    for mode in ("L", "RGBA", "P"):
        assert generator.prepare("What?", square().convert(mode)).images[0][0].image.mode == "RGB"
    turned = Image.new("RGB", (40, 20))
    turned.getexif()[0x0112] = 6
    assert generator.prepare("What?", turned).images[0][0].image.size == (20, 40)


def test_a_crop_in_the_padding_is_none():
    """The image is upright: the first columns of the map are padding."""
    generator = make_generator("llava", ((0, 1, 2, 5),))
    image = picture(20, 60)
    focused = generator.prepare("What?", image, threshold=0.4)
    assert focused.images[0][0].boxes == []
    assert tokens(generator, "What?", image) == plain_tokens("llava", ["What?"], [image])


def test_empty_and_full_maps(kind):
    for value, has_region in ((1e-4, False), (1 - 1e-4, kind == "qwen2_5_vl")):
        generator = make_generator(kind)
        force_maps(generator.rpn, torch.full((GRID, GRID), value))
        found = generator.prepare("What?", square(), threshold=0.4).images[0][0]
        assert bool(found.boxes) == has_region
        if has_region:
            assert found.boxes == [(0, 0, *square().size)]


def test_the_image_of_llava_is_padded_with_the_mean_colour():
    padded = pad_to_square(Image.new("RGB", (4, 2), (255, 0, 0)), (1, 2, 3))
    assert padded.size == (4, 4)
    assert [padded.getpixel((0, row)) for row in range(4)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]
    processor = tiny_processor("llava")
    read = read_prompt(processor, "What?", Image.new("RGB", (40, 20), (255, 0, 0)))
    pixel_values = encode_prompts(processor, tiny_base("llava").config, [read])["pixel_values"]
    # The mean colour is zero after normalisation, up to rounding to eight bits.
    assert pixel_values[0, :, 0].abs().max() < 0.02
    assert pixel_values[0, :, IMAGE_SIZE // 2].abs().min() > 0.5


# --- bad input ---------------------------------------------------------------------------------------


def test_images_and_prompts_that_do_not_fit(kind):
    generator = make_generator(kind)
    with pytest.raises(ValueError, match="2 prompts and 1 entries of images"):
        generator.prepare(["What?", "Who?"], [square()])
    with pytest.raises(ValueError, match="2 prompts and 1 entries of images"):
        generator.prepare(["What?", "Who?"], square())
    with pytest.raises(ValueError, match=r"0 image placeholders .* for 1 images"):
        generator.prepare([{"role": "user", "content": "What?"}], square())
    with pytest.raises(ValueError, match=r"1 image placeholders .* for 0 images"):
        generator.prepare(f"{generator.processor.image_token} What?")
    with pytest.raises(ValueError, match="not both"):
        messages = [{"role": "user", "content": [{"type": "image", "image": square()}]}]
        generator.prepare(messages, square())
    with pytest.raises(ValueError, match="There are no prompts"):
        generator.prepare([])


def test_inputs_with_fewer_originals_than_images(kind):
    generator = make_generator(kind)
    read = read_prompt(generator.processor, "What?", square())
    inputs = encode_prompts(generator.processor, generator.base.config, [read])
    with pytest.raises(ValueError, match="tokens of 1 images, but 0 images were passed"):
        generator.focus(inputs, [[]], 0.4)


def test_without_a_chat_template_the_prompt_has_to_be_written_out(kind):
    generator = make_generator(kind, NONE)
    generator.processor.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template\. Pass the prompt in the format of the base"):
        generator.prepare("What?", square())
    assert len(generator.generate(f"{generator.processor.image_token} What?", square(), **GREEDY)) == 1
    assert len(generator.generate("Hello", **GREEDY)) == 1


# --- the overlay ---------------------------------------------------------------------------------------------------


def test_the_overlay_shows_map_and_boxes():
    image = Image.new("RGB", (120, 60), (90, 90, 90))
    generator = make_generator("llava", ((3, 2, 6, 4),))
    found = generator.prepare("What?", image, threshold=0.4).images[0][0]
    (box,) = found.boxes
    assert box == (60, 10, 120, 50)
    overlay = found.overlay()
    assert overlay.getpixel((60, 30)) == overlay.getpixel((119, 30)) == (0, 255, 90)
    hot, cold = overlay.getpixel((90, 30)), overlay.getpixel((15, 30))
    assert hot[0] > cold[0] + 60 and hot[2] < cold[2]
    assert image.getpixel((90, 30)) == (90, 90, 90)
