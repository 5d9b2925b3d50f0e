"""The pipeline `scanpath-prediction`: images and boxes in; objects, centres, scores and drawings out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline, set_seed

from hf_attn import AutoModelForScanpathPrediction, OATConfig
from hf_attn.modeling.oat.drawing import PATH, TARGET, draw_scanpath
from hf_attn.modeling.oat.layout import grid_boxes
from hf_attn.modeling.oat.processing_oat import OATImageProcessor
from tests.batteries.generation import spread_weights


BOXES = grid_boxes(2, 3, 100, 150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    set_seed(0)
    model = spread_weights(AutoModelForScanpathPrediction.from_config(OATConfig.from_variant("tiny")))
    folder = tmp_path_factory.mktemp("oat")
    model.save_pretrained(folder)
    OATImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("scanpath-prediction", model=str(folder), device="cpu")


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8))


def test_one_scanpath_is_that_of_generate(pipe, image):
    (result,) = pipe(image, boxes=BOXES, target_index=4)
    inputs = pipe.image_processor(image, BOXES, 4)
    ids = pipe.model.generate(**inputs)
    assert [result["objects"]] == pipe.image_processor.post_process_scanpaths(ids, inputs)[0]
    assert result["centres"][0] == [25 + 50 * (result["objects"][0] % 3), 25 + 50 * (result["objects"][0] // 3)]
    with torch.no_grad():
        probabilities = pipe.model(**inputs, decoder_input_ids=ids).logits[0, 0, :6].softmax(-1)
    assert result["scores"][0] == pytest.approx(probabilities.max().item(), rel=1e-4)
    assert result["found"] == (result["objects"][-1] == 4)
    assert 0 < result["score"] <= np.prod(result["scores"]) * (1 + 1e-6)


def test_several_scanpaths_are_sampled(pipe, image):
    set_seed(0)
    results = pipe(image, grid=(2, 3), target_index=1, num_scanpaths=20)
    assert len(results) == 20
    assert len({tuple(result["objects"]) for result in results}) > 1


def test_several_scenes(pipe, image):
    scenes = [
        {"image": image, "grid": (2, 3), "target_index": 4},
        {"image": image, "boxes": BOXES[:4], "target_box": [1, 1, 49, 49]},
    ]
    first, second = pipe(scenes)
    assert first == pipe(image, boxes=BOXES, target_index=4)
    assert all(index < 4 for index in second[0]["objects"])


def test_drawings_have_the_target_and_the_path(pipe, image):
    picture = pipe(image, boxes=BOXES, target_index=4, draw=True)[0]["picture"]
    assert picture.size == image.size
    colours = {colour for _, colour in picture.getcolors(maxcolors=10**6)}
    assert {PATH, TARGET} <= colours


def test_drawing_marks_each_fixation():
    """A circle at the centre of each fixated object, and none elsewhere."""
    blank = Image.new("RGB", (150, 100), "white")
    picture = draw_scanpath(blank, BOXES, [0, 5], target_index=5)
    near = [picture.crop((x - 8, y - 8, x + 8, y + 8)).getcolors(10**6) for x, y in ((25, 25), (125, 75), (25, 75))]
    assert [any(colour == PATH for _, colour in colours) for colours in near] == [True, True, False]
    assert blank.getpixel((25, 25)) == (255, 255, 255)
    with pytest.raises(ValueError, match="Object 6 is out of range"):
        draw_scanpath(blank, BOXES, [6], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_index": 0}, "boxes, or the rows and columns"),
        ({"grid": (2, 3)}, "either target_index or target_box"),
        ({"grid": (2, 3), "target_index": 6}, "target_index 6 is out of range"),
        ({"grid": (2, 3), "target_index": 0, "num_scanpaths": 0}, "num_scanpaths must be at least 1"),
        ({"boxes": [[0, 0, 200, 50]], "target_index": 0}, "not inside the image"),
        ({"boxes": BOXES[:5], "grid": (2, 3), "target_index": 0}, "5 boxes, but 6 cells"),
        ({"grid": (2, 3), "target_index": 0, "num_scanpath": 3}, "num_scanpath"),
    ],
)
def test_bad_input(pipe, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(image, **arguments)


def test_model_as_an_object_needs_its_processor(pipe):
    with pytest.raises(Exception, match=r"image.processor"):
        pipeline("scanpath-prediction", model=pipe.model)
