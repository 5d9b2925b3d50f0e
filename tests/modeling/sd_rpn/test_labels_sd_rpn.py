"""Pseudo-labels: properties of the paper's rules, and input that is not attention."""

import pytest
import torch

from hf_attn.modeling.sd_rpn.labels.rule import (
    BACKGROUND,
    FOREGROUND,
    IGNORED,
    llava_pseudo_labels,
    padded_cells,
    qwen_pseudo_labels,
)


SIDE = 24


def blob(row: int, column: int, radius: float = 1.5, scale: float = 1.0) -> torch.Tensor:
    rows, columns = torch.arange(SIDE)[:, None] - row, torch.arange(SIDE) - column
    return scale * torch.exp(-(rows**2 + columns**2) / (2 * radius**2))


def label(rule, grounding, sink=None):
    sink = torch.zeros_like(grounding) if sink is None else sink
    more = ([(100, 100)] * len(grounding),) if rule is qwen_pseudo_labels else ()
    return rule(grounding, sink, *more)


RULES = pytest.mark.parametrize("rule", [llava_pseudo_labels, qwen_pseudo_labels])


@RULES
def test_foreground_lies_in_the_box_and_background_outside(rule):
    torch.manual_seed(0)
    grounding = torch.stack([blob(row, row + 3, 1 + row / 8) for row in range(3, 18)])
    grounding += 0.15 * torch.rand_like(grounding)
    labels, boxes = label(rule, grounding, (torch.rand_like(grounding) < 0.05).float())
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    kinds = set()
    for cells, (top, left, bottom, right) in zip(labels, boxes, strict=True):
        inside = (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
        assert not (cells[~inside] == FOREGROUND).any()
        assert not (cells[inside] == BACKGROUND).any()
        kinds |= set(cells.unique().tolist())
    assert kinds == {FOREGROUND, BACKGROUND, IGNORED}


@RULES
def test_uninformative_maps_are_ignored(rule):
    nothing = torch.zeros(SIDE, SIDE)
    far = blob(2, 2) + blob(20, 20)
    grounding = torch.stack([nothing, blob(10, 10), far, blob(10, 10)])
    sink = torch.stack([nothing, nothing + 1, nothing, nothing])
    labels, boxes = label(rule, grounding, sink)
    assert (labels[:3] == IGNORED).all()
    assert boxes[0].tolist() == boxes[1].tolist() == [0, 0, SIDE - 1, SIDE - 1]
    assert set(labels[3].unique().tolist()) > {FOREGROUND, BACKGROUND}


def test_scale_matters_for_qwen_but_not_for_llava():
    grounding = torch.stack([blob(5, 6), blob(15, 15, 3)])
    expected = label(llava_pseudo_labels, grounding)
    for scale in (2**-20, 2**-3, 2**10):
        labels, boxes = label(llava_pseudo_labels, scale * grounding)
        assert torch.equal(labels, expected.labels)
        assert torch.equal(boxes, expected.boxes)
    assert (label(qwen_pseudo_labels, 0.0051 * grounding).labels != IGNORED).any()
    assert (label(qwen_pseudo_labels, 0.0049 * grounding).labels == IGNORED).all()


def test_sinks_are_no_foreground_but_background_outside_the_box():
    grounding = blob(10, 10) + 5 * blob(2, 20, 0.3)
    sink = (blob(2, 20, 0.3) > 0.5).float()
    with_sink = label(llava_pseudo_labels, grounding[None], sink[None])
    assert with_sink.labels[0, 2, 20] == BACKGROUND
    assert torch.equal(with_sink.labels, label(llava_pseudo_labels, blob(10, 10)[None]).labels)
    inside = torch.zeros(SIDE, SIDE)
    inside[10, 10] = 1
    assert label(llava_pseudo_labels, grounding[None], (sink + inside)[None]).labels[0, 10, 10] == IGNORED


def test_thresholds_are_strict():
    grounding = torch.zeros(1, 4, 4)
    grounding[0, 0, :3] = torch.tensor([1.0, 0.25, 0.5])
    grounding[0, 3, 3] = 0.125
    sink = torch.zeros(1, 4, 4)
    ratios = {"foreground_ratio": 0.25, "background_ratio": 0.125}
    labels, boxes = llava_pseudo_labels(grounding, sink, **ratios)
    assert boxes.tolist() == [[0, 0, 0, 2]]
    assert labels[0, 0].tolist() == [FOREGROUND, IGNORED, FOREGROUND, BACKGROUND]
    assert labels[0, 3, 3] == IGNORED
    assert (llava_pseudo_labels(grounding, sink, max_box_ratio=3 / 16, **ratios).labels == IGNORED).all()
    sink[0, 0, 2] = 1e-3
    assert llava_pseudo_labels(grounding, sink.double().fill_(1e-3), **ratios).labels.unique().tolist() == [IGNORED]


def test_padding_is_background_and_never_foreground():
    in_the_padding = blob(1, 10)
    labels, boxes = qwen_pseudo_labels(
        (2 * in_the_padding + blob(12, 12))[None], torch.zeros(1, SIDE, SIDE), [(640, 320)]
    )
    padding = padded_cells(640, 320, SIDE)
    assert (labels[0][padding] == BACKGROUND).all()
    assert boxes[0, 0] > 5
    assert labels[0, 12, 12] == FOREGROUND


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((640, 480), (3, 21), (0, 24)),
        ((300, 900), (0, 24), (8, 16)),
        # 9 rows of padding; a cell that is partly padding counts as part of the image
        ((600, 390), (4, 20), (0, 24)),
        ((5000, 3), (11, 13), (0, 24)),
        ((77, 77), (0, 24), (0, 24)),
    ],
)
def test_cells_of_the_image_in_its_square(size, rows, columns):
    image = ~padded_cells(*size, SIDE)
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(image, expected)


def test_half_precision_maps_are_compared_exactly():
    grounding = blob(8, 8)[None].half()
    assert torch.equal(
        label(llava_pseudo_labels, grounding).labels, label(llava_pseudo_labels, grounding.double()).labels
    )


@RULES
@pytest.mark.parametrize(
    ("grounding", "sink", "message"),
    [
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 5), r"\(1, 4, 4\) and \(1, 4, 5\)"),
        (torch.zeros(4, 4), torch.zeros(4, 4), "same shape"),
        (torch.full((1, 4, 4), torch.nan), torch.zeros(1, 4, 4), "grounding map contains negative or non-finite"),
        (torch.zeros(1, 4, 4), torch.full((1, 4, 4), -0.1), "sink map contains negative"),
    ],
)
def test_maps_that_are_wrong(rule, grounding, sink, message):
    with pytest.raises(ValueError, match=message):
        label(rule, grounding, sink)


def test_qwen_needs_squares_and_sizes():
    with pytest.raises(ValueError, match="grids are 4x6"):
        qwen_pseudo_labels(torch.zeros(1, 4, 6), torch.zeros(1, 4, 6), [(4, 6)])
    with pytest.raises(ValueError, match="1 maps, but 2 image sizes"):
        qwen_pseudo_labels(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), [(4, 6)] * 2)
    with pytest.raises(ValueError, match="must be positive, got 0, 6"):
        qwen_pseudo_labels(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), [(0, 6)])
