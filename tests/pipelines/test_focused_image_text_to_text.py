"""The pipeline `focused-image-text-to-text`."""

import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer, pipeline

from hf_attn.modeling.sd_rpn.generation import FocusedImage, SdRpnGenerator
from hf_attn.pipelines.focused_image_text_to_text import FocusedImageTextToTextPipeline
from tests.modeling.sd_rpn.tiny import BASES, picture, tiny_base, tiny_processor, tiny_rpn


TASK = "focused-image-text-to-text"
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "threshold": -0.9}


def make_pipeline(kind: str, **options):
    parts = {"model": tiny_base(kind), "processor": tiny_processor(kind), "rpn": tiny_rpn(kind)}
    return pipeline(TASK, **{**parts, **options}, device="cpu")


@pytest.fixture(scope="module", params=BASES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    return make_pipeline(kind)


def expected(kind: str, prompts, images) -> list[str]:
    generator = SdRpnGenerator(tiny_base(kind), tiny_rpn(kind), tiny_processor(kind))
    return [answer.text for answer in generator.generate(prompts, images, **OPTIONS)]


def test_one_image_and_a_text(pipe, kind):
    image = picture(100, 70)
    answer = pipe(image, text="What?", **OPTIONS)
    assert answer["input_text"] == "What?"
    assert [answer["generated_text"]] == expected(kind, "What?", image)
    (found,) = answer["images"]
    assert isinstance(found, FocusedImage) and found.threshold == -0.9
    assert found.overlay().size == (100, 70)


@pytest.mark.parametrize("batch_size", [None, 2, 8])
def test_lists_in_batches_of_any_size(pipe, kind, batch_size):
    images, texts = [picture(100, 70), None, picture(40, 90, 1)], ["What?", "Hello", "And this one?"]
    answers = pipe(images, text=texts, batch_size=batch_size, **OPTIONS)
    assert [answer["generated_text"] for answer in answers] == expected(kind, texts, images)
    assert [len(answer["images"]) for answer in answers] == [1, 0, 1]


def test_every_form_of_prompt(pipe, tmp_path):
    image = picture(100, 70)
    image.save(tmp_path / "image.png")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    entry = {"images": image, "text": "What?"}
    wanted = pipe(image, text="What?", **OPTIONS)["generated_text"]
    for single in (
        pipe(str(tmp_path / "image.png"), text="What?", **OPTIONS),
        pipe(text=chat, **OPTIONS),
        pipe(chat, **OPTIONS),
        pipe(entry, **OPTIONS),
    ):
        assert single["generated_text"] == wanted
    for several in (
        pipe([image], text=["What?"], **OPTIONS),
        pipe(text=[chat], **OPTIONS),
        pipe([chat], **OPTIONS),
        pipe([entry], **OPTIONS),
        list(pipe((entry for _ in range(1)), **OPTIONS)),
    ):
        assert [answer["generated_text"] for answer in several] == [wanted]


def test_a_data_set_is_answered_as_it_is_read(pipe):
    """The second entry is read only when its answer is requested."""
    read = []

    def entries():
        for index in range(2):
            read.append(index)
            yield {"images": picture(50, 50, index), "text": "What?"}

    answers = pipe(entries(), **OPTIONS)
    assert read == []
    next(answers)
    assert read == [0]
    assert len(list(answers)) == 1


def test_loads_by_folders(kind, tmp_path):
    tiny_base(kind).save_pretrained(tmp_path / "base")
    tiny_processor(kind).save_pretrained(tmp_path / "base")
    tiny_rpn(kind).save_pretrained(tmp_path / "rpn")
    picture(100, 70).save(tmp_path / "image.png")

    pipe = pipeline(TASK, model=str(tmp_path / "base"), rpn=str(tmp_path / "rpn"), device="cpu")
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipe(str(tmp_path / "image.png"), text="What?", streamer=streamer, **OPTIONS)
    assert [answer["generated_text"]] == expected(kind, "What?", picture(100, 70)) == ["".join(streamer)]

    answer["images"][0].overlay().save(tmp_path / "where.png")
    with Image.open(tmp_path / "where.png") as saved:
        assert saved.size == (100, 70)
        assert saved.getpixel(answer["images"][0].boxes[0][:2]) == (0, 255, 90)


def test_parameters_of_the_constructor_hold_for_every_call(kind):
    pipe = make_pipeline(kind, threshold=-0.5, max_new_tokens=2)
    found = pipe(picture(60, 60), text="What?")
    assert found["images"][0].threshold == -0.5
    assert pipe(picture(60, 60), text="What?", threshold=-0.7)["images"][0].threshold == -0.7
    by_task = make_pipeline(kind, focus_task="ocrbench", max_new_tokens=2)
    assert by_task(picture(60, 60), text="What?")["images"][0].threshold == 0.05


def test_options_of_generate(pipe):
    image = picture(60, 60)
    several = pipe(image, text="What?", num_beams=3, num_return_sequences=2, **OPTIONS)["generated_text"]
    assert isinstance(several, list) and len(several) == 2
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "threshold": -0.9}
    assert (
        pipe(image, text="What?", **options)["generated_text"]
        == pipe(image, text="What?", **OPTIONS)["generated_text"]
    )
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipe(image, text="What?", streamer=streamer, **OPTIONS)
    assert "".join(streamer) == answer["generated_text"]


def test_missing_inputs_are_named(pipe):
    with pytest.raises(ValueError, match="needs the region proposal network"):
        make_pipeline("llava", rpn=None)
    with pytest.raises(ValueError, match="its processor must be passed too"):
        FocusedImageTextToTextPipeline(model=tiny_base("llava"), rpn=tiny_rpn("llava"), device="cpu")
    with pytest.raises(ValueError, match=r"is for a llava .* the base is a llava_next"):
        make_pipeline("llava_next", rpn=tiny_rpn("llava"))
    with pytest.raises(ValueError, match="Pass a text"):
        pipe(picture(10, 10))
    with pytest.raises(ValueError, match="Pass a text"):
        pipe("image.png")
    with pytest.raises(ValueError, match="2 texts and 1 images"):
        pipe([picture(10, 10)], text=["What?", "Who?"])
    with pytest.raises(ValueError, match="must be a dictionary with 'text' and 'images', got str"):
        pipe(["a.png", "b.png"])


def test_saved_pipeline_keeps_the_network(tmp_path):
    pipe = make_pipeline("llava")
    pipe.save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    loaded.model.generation_config.eos_token_id = None
    for name, tensor in pipe.generator.rpn.state_dict().items():
        assert torch.equal(loaded.generator.rpn.state_dict()[name], tensor), name
    image = picture(100, 70)
    answers = [each(image, text="What?", **OPTIONS)["generated_text"] for each in (pipe, loaded)]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="upload_folder"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)
