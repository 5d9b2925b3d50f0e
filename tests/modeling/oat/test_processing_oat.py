"""Boxes, grids and fixations, and the image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_attn import OATConfig
from hf_attn.modeling.oat.layout import (
    check_boxes,
    grid_boxes,
    grid_positions,
    object_of_box,
    objects_at,
    reading_order,
)
from hf_attn.modeling.oat.processing_oat import OATImageProcessor


BOXES = [[0, 0, 10, 20], [10, 0, 20, 20], [0, 20, 10, 40], [10, 20, 20, 40]]


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)


def test_crops_are_the_pixels_of_the_boxes(image):
    inputs = OATImageProcessor(size={"height": 20, "width": 10})(image, BOXES, 3, grid=(2, 2))
    assert inputs["pixel_values"].shape == (1, 4, 3, 20, 10)
    expected = torch.from_numpy(image[20:40, 10:20]).permute(2, 0, 1) / 255
    torch.testing.assert_close(inputs["pixel_values"][0, 3], expected)
    assert inputs["target_index"].tolist() == [3]
    assert inputs["object_positions"][0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert "object_mask" not in inputs


def test_resize_is_bilinear_without_antialiasing():
    """A box of two by two pixels: half-pixel centres, as in OpenCV."""
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[:, 1] = 255
    crop = OATImageProcessor(size={"height": 2, "width": 4})(image, [[0, 0, 2, 2]], 0)["pixel_values"][0, 0, 0]
    torch.testing.assert_close(crop, torch.tensor([[0, 0.25, 0.75, 1]]).expand(2, -1))


def test_grey_transparent_and_turned_images():
    processor = OATImageProcessor()
    grey = processor.read_image(np.full((4, 4), 51, dtype=np.uint8))
    torch.testing.assert_close(grey, torch.full((3, 4, 4), 0.2))
    clear = processor.read_image(np.zeros((4, 4, 4), dtype=np.uint8))
    torch.testing.assert_close(clear, torch.ones(3, 4, 4))


def test_batch_of_scenes_of_different_size(image):
    inputs = OATImageProcessor()([image, image], [BOXES, BOXES[:2]], [3, 0], fixations=[[[5, 5], [15, 30]], [[12, 3]]])
    assert inputs["object_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert inputs["labels"].tolist() == [[0, 3, 4], [1, 4, -100]]
    assert inputs["pixel_values"].shape == (2, 4, 3, 150, 93)


def test_target_of_a_box(image):
    assert OATImageProcessor()(image, BOXES, target_boxes=[8, 2, 19, 18])["target_index"].item() == 1
    with pytest.raises(ValueError, match="There is no object at the box"):
        object_of_box([30, 30, 40, 40], torch.tensor(BOXES))


def test_reading_order_and_grid():
    """Boxes whose tops differ by a few pixels are in one row; the order of the boxes does not matter."""
    boxes = torch.tensor([[50, 103, 60, 120], [0, 3, 10, 20], [50, 1, 60, 20], [0, 100, 10, 120]])
    assert reading_order(boxes, 10).tolist() == [1, 2, 3, 0]
    assert grid_positions(boxes, (2, 2)).tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
    assert torch.equal(grid_positions(boxes), grid_positions(boxes, (2, 2)))
    with pytest.raises(ValueError, match="4 boxes, but 6 cells in the grid of 2 x 3"):
        grid_positions(boxes, (2, 3))


def test_irregular_layouts_have_rows_and_columns():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [20, 20, 30, 30], [40, 20, 50, 30]])
    assert grid_positions(boxes).tolist() == [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2]]
    crowded = torch.tensor([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert len(set(map(tuple, grid_positions(crowded).tolist()))) == 3


def test_fixations_are_at_boxes_or_the_nearest_centre():
    boxes = torch.tensor([[0, 0, 10, 10], [5, 0, 25, 10], [40, 0, 50, 10]])
    assert objects_at([[2, 2], [6, 5], [24, 5], [33, 5], [-50, 5]], boxes).tolist() == [0, 0, 1, 2, 0]
    assert objects_at([], boxes).tolist() == []
    with pytest.raises(ValueError, match="Fixation 1"):
        objects_at([[1, 2], [float("nan"), 3]], boxes)


def test_cells_of_a_grid_cover_the_image():
    boxes = grid_boxes(3, 7, 100, 50)
    assert len(boxes) == 21
    assert (boxes[:, 2:] - boxes[:, :2]).prod(1).sum() == 5000
    assert torch.equal(check_boxes(boxes, 100, 50), boxes)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "at least one object"),
        ([[0, 0, 10]], "at least one object"),
        ([[0, 0, 10, 41]], "not inside the image of 20 x 40"),
        ([[-3, 0, 10, 10]], "not inside"),
        ([[5, 5, 5, 10]], "Box 0.*is empty"),
        ([[0, 0, 10, 10], [9, 9, 2, 2]], "Box 1.*is empty"),
        ([[0.1, 0.1, 0.4, 0.4]], "in pixels"),
        ([[0, 0, 10, 10], [0, 0, 10, 10]], "Boxes 0 and 1 overlap by 100%"),
        ([[0, 0, float("nan"), 10]], "not finite"),
    ],
)
def test_bad_boxes(image, boxes, message):
    with pytest.raises(ValueError, match=message):
        OATImageProcessor()(image, boxes, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_index": 4}, "target_index 4 is out of range: there are 4 boxes"),
        ({"target_index": -1}, "target_index -1"),
        ({}, "either target_index or target_boxes"),
        ({"target_index": 0, "grid": (3, 3)}, "9 cells in the grid"),
        ({"target_index": 0, "return_tensors": "np"}, "return_tensors"),
    ],
)
def test_bad_arguments(image, arguments, message):
    with pytest.raises(ValueError, match=message):
        OATImageProcessor()(image, BOXES, **arguments)


def test_lists_of_different_length_and_the_image_that_is_wrong(image):
    with pytest.raises(ValueError, match="2 images but 1 boxes"):
        OATImageProcessor()([image, image], [BOXES], [0, 0])
    with pytest.raises(ValueError, match="Image 1: target_index 9"):
        OATImageProcessor()([image, image], [BOXES, BOXES], [0, 9])
    with pytest.raises(ValueError, match="There is no image file"):
        OATImageProcessor()("missing.png", BOXES, 0)


def test_saved_processor_is_found_by_the_auto_class(tmp_path):
    config = OATConfig.from_variant("tiny")
    OATImageProcessor.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is OATImageProcessor
    assert loaded.size == {"height": 24, "width": 20}


def test_generated_ids_become_objects(image):
    processor = OATImageProcessor()
    inputs = processor([image, image], [BOXES, BOXES], [0, 1])
    ids = torch.tensor([[6, 1, 2, 4, 5], [6, 3, 0, 1, 2], [6, 2, 4, 5, 5], [6, 0, 0, 0, 4]])
    assert processor.post_process_scanpaths(ids, inputs) == [[[1, 2], [3, 0, 1, 2]], [[2], [0, 0, 0]]]


def test_pillow_images_are_read(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "scene.png")
    from_path = OATImageProcessor()(str(tmp_path / "scene.png"), BOXES, 0)["pixel_values"]
    torch.testing.assert_close(from_path, OATImageProcessor()(Image.fromarray(image), BOXES, 0)["pixel_values"])
