"""From RoI maps to boxes, in cells and in pixels."""

import pytest
import torch
from scipy import ndimage
from torchvision.transforms.functional import gaussian_blur

from hf_attn.modeling.sd_rpn.regions import (
    Region,
    above_threshold,
    asked_tokens,
    blur,
    connected_components,
    extent,
    llava_regions,
    padded_to_image,
    qwen_regions,
    region_boxes,
    scaled_to_image,
)

from .tiny import blob


G24 = (24, 24)


@pytest.mark.parametrize("shape", [(24, 24), (2, 2), (5, 31), (1, 7), (7, 1), (1, 1)])
def test_the_blur_is_torchvision_s_where_that_is_defined(shape):
    roi_map = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    blurred = blur(roi_map)
    assert blurred.shape == shape
    if min(shape) > 1:
        torch.testing.assert_close(blurred, gaussian_blur(roi_map[None], kernel_size=3, sigma=1.0)[0])
    else:
        wide = gaussian_blur(roi_map.expand(max(shape[0], 3), max(shape[1], 3))[None], kernel_size=3, sigma=1.0)[0]
        torch.testing.assert_close(blurred, wide[: shape[0], : shape[1]])


def test_components_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    for density in (0.1, 0.3, 0.5, 0.9):
        binary = torch.rand(13, 24, generator=generator) < density
        labels, count = ndimage.label(binary.numpy(), structure=[[1, 1, 1]] * 3)
        found = connected_components(binary)
        assert len(found) == count
        for index, component in enumerate(found, start=1):
            assert torch.equal(component, torch.from_numpy(labels == index))


def test_a_negative_threshold_is_a_fraction_of_the_maximum():
    blurred = torch.tensor([[0.1, 0.3, 0.4]])
    assert above_threshold(blurred, 0.2).tolist() == [[False, True, True]]
    assert above_threshold(blurred, -0.8).tolist() == [[False, False, True]]


def cells(*positions: tuple[int, int], grid=G24) -> torch.Tensor:
    binary = torch.zeros(grid, dtype=torch.bool)
    for row, column in positions:
        binary[row, column] = True
    return binary


def test_small_regions_are_widened_and_single_cells_dropped():
    assert region_boxes(cells((5, 7))) == []
    # Two cells side by side end at column 9, exclusive: the middle is 8, and three cells around it are 6 .. 9.
    # No widened box reaches the last row or column, by the official rule.
    assert region_boxes(cells((5, 7), (5, 8))) == [(6, 4, 9, 7)]
    assert region_boxes(cells((5, 7), (6, 8), (7, 9))) == [(6, 4, 10, 8)]
    assert region_boxes(cells((0, 0), (0, 1))) == [(0, 0, 2, 2)]
    assert region_boxes(cells((23, 22), (23, 23))) == [(21, 22, 23, 23)]
    assert region_boxes(cells((5, 7), (5, 8), (6, 7), (6, 8))) == [(7, 5, 9, 7)]


def test_regions_that_are_too_large_are_dropped():
    binary = cells()
    binary[:15, :15] = True
    assert region_boxes(binary) == [(0, 0, 15, 15)]
    binary[15, 0] = True
    assert region_boxes(binary) == []
    binary[20, 20:22] = True
    assert region_boxes(binary) == [(19, 19, 22, 22)]
    assert region_boxes(torch.ones(12, 12, dtype=torch.bool), max_area=144) == [(0, 0, 12, 12)]


def test_extent():
    assert extent(cells()) is None
    assert extent(cells((2, 5), (9, 3))) == (3, 2, 6, 10)


def test_pixels_of_a_padded_image():
    assert padded_to_image((9, 4, 17, 10), G24, (640, 480)) == (240, 26, 453, 186)
    assert padded_to_image((0, 0, 24, 24), G24, (640, 480)) == (0, 0, 640, 480)
    # Corners on whole pixels, which rounding of floats could shift by one pixel.
    assert padded_to_image((9, 10, 15, 13), G24, (600, 200)) == (225, 50, 375, 125)
    assert padded_to_image((1, 1, 6, 6), G24, (1000, 250))[::2] == (41, 250)
    # Entirely in the padding on the left of an upright image.
    assert padded_to_image((0, 1, 7, 8), G24, (300, 900))[::2] == (0, 0)


def test_pixels_of_an_image_resized_as_a_whole():
    assert scaled_to_image((0, 0, 12, 8), (8, 12), (100, 50)) == (0, 0, 100, 50)
    assert scaled_to_image((1, 2, 5, 3), (8, 12), (100, 50)) == (8, 12, 41, 18)


# --- LLaVA ---------------------------------------------------------------------------------------------------------


def test_an_empty_map_and_a_full_one_have_no_region():
    for value in (0.0, 1.0):
        assert llava_regions(torch.full(G24, value), 0.15, (640, 480)) == []


def test_one_region_is_cropped_with_all_tokens():
    (region,) = llava_regions(blob(G24, (9, 6, 17, 12)), 0.5, (640, 480))
    assert region.binary is None and region.grid_box == (9, 6, 17, 12)
    assert region.box == padded_to_image((9, 6, 17, 12), G24, (640, 480))
    assert region.kept_tokens(G24).all()


def test_of_several_regions_the_tokens_inside_are_kept():
    roi_map = blob(G24, (4, 6, 8, 10), (14, 12, 18, 16))
    # A single cell is not a region, but belongs to the extent.
    roi_map[18, 1] = 1.0
    (region,) = llava_regions(roi_map, 0.15, (480, 480))
    binary = above_threshold(blur(roi_map), 0.15)
    assert region.grid_box == extent(binary)
    assert region.grid_box[0] == 0
    kept = region.kept_tokens(G24)
    assert 0 < kept.sum() < 576
    x0, y0, x1, y1 = region.grid_box
    rows, columns = ((torch.arange(24) + 0.5) / 24 * size for size in (y1 - y0, x1 - x0))
    nearest = binary[y0:y1, x0:x1][rows.long()][:, columns.long()].flatten()
    assert (kept == nearest).float().mean() > 0.9


def test_without_masks_two_regions_are_two_crops_and_more_are_none():
    two = blob(G24, (4, 6, 8, 10), (14, 12, 18, 16))
    assert [region.grid_box for region in llava_regions(two, 0.5, (480, 480), masked=False)] == [
        (4, 6, 8, 10),
        (14, 12, 18, 16),
    ]
    three = blob(G24, (4, 6, 8, 10), (14, 12, 18, 16), (1, 18, 4, 21))
    assert llava_regions(three, 0.5, (480, 480), masked=False) == []


def test_a_region_in_the_padding_does_not_count():
    """The image is upright: columns 0 .. 7 and 16 .. 23 are padding."""
    padding, inside = (1, 4, 5, 8), (10, 12, 14, 16)
    assert llava_regions(blob(G24, padding), 0.5, (300, 900)) == []
    (region,) = llava_regions(blob(G24, padding, inside), 0.5, (300, 900))
    assert (region.grid_box, region.binary) == (inside, None)
    (region,) = llava_regions(blob(G24, padding, inside, (10, 18, 14, 22)), 0.5, (300, 900))
    assert region.binary is not None and region.box[0] < region.box[2]


def test_llava_next_s_view_is_not_padded():
    (region,) = llava_regions(blob(G24, (12, 6, 24, 12)), 0.5, (600, 300), encoder_size=None)
    assert region.box == (300, 75, 600, 150)


# --- Qwen2.5-VL ----------------------------------------------------------------------------------------------------


def test_qwen_takes_the_extent_of_everything():
    assert qwen_regions(torch.zeros(10, 20), 0.1, (560, 280)) == []
    (region,) = qwen_regions(torch.ones(10, 20), 0.1, (560, 280))
    assert region.box == (0, 0, 560, 280) and region.kept_tokens((10, 20)).all()
    (region,) = qwen_regions(blob((10, 20), (2, 3, 5, 6), (14, 6, 17, 9)), 0.5, (560, 280))
    assert region.grid_box == (2, 3, 17, 9)
    assert region.box == (56, 84, 476, 252)
    assert 0 < region.kept_tokens((6, 15)).sum() < 90


def test_the_border_of_large_maps_is_cleared():
    """28 x 28 cells: rows 0 .. 6 of column 0 and columns 0 .. 6 of row 0 are artefacts."""
    roi_map = blob((28, 28), (10, 10, 14, 14))
    roi_map[:7, 0] = roi_map[0, :7] = 1.0
    (region,) = qwen_regions(roi_map, 0.15, (784, 784))
    assert region.grid_box == (9, 9, 15, 15)
    assert roi_map[0, 0] == 1.0
    small = blob((24, 24), (10, 10, 14, 14))
    small[0, 0] = 1.0
    assert qwen_regions(small, 0.15, (784, 784))[0].grid_box[:2] == (0, 0)


def test_a_token_stays_if_one_query_looks_at_it():
    """0.01 is a logit of -4.595."""
    logits = torch.tensor([[-9.0, -4.59, -9.0, 3.0], [-4.6, -9.0, -9.0, -9.0]])
    assert asked_tokens(logits).tolist() == [False, True, False, True]
    assert asked_tokens(torch.zeros(0, 4)).all()


def test_a_region_of_no_pixels_is_none():
    """The image is smaller than the map."""
    assert qwen_regions(blob((4, 4), (0, 0, 1, 1)), 0.2, (2, 2)) == []


def test_some_token_is_always_kept():
    # Checked squares of 3 x 3 cells vanish in a grid of one token.
    binary = cells((0, 0), grid=(3, 3))
    assert Region((0, 0, 9, 9), (0, 0, 3, 3), binary).kept_tokens((1, 1)).all()
