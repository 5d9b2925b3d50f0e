"""Training of RMT with token labelling (arXiv 2104.10858): a label for each position of the last feature map.

Two images share a map: a box of the stem's output is swapped with that of the batch in reverse order ("mix-token"), and the
scores of the positions inside are swapped back. With t the soft targets of an image, t_p those of its positions and k the part
of the map outside of the box,

    loss = CE(class_logits, k t + (1 - k) reversed(t)) + 0.5 CE(token_logits, t_p)
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import ModelOutput

from .modeling_rmt import RMTForImageClassification


#: first row, first column, last row + 1, last column + 1, in positions of the last feature map
Box = tuple[int, int, int, int]


def position_grid(model: RMTForImageClassification, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Height and width of the last feature map for images `(batch, channels, height, width)`."""
    stride = 4 * _stem_cells(model)
    return tuple(-(-side // stride) for side in pixel_values.shape[2:])


def _stem_cells(model: RMTForImageClassification) -> int:
    """Positions of the stem's map, along a side, for one of the last map."""
    return 2 ** (model.config.num_stages - 1)


def draw_box(height: int, width: int, generator: random.Random | None = None) -> Box:
    """Draw a box whose area is uniform between nothing and the whole map, and cut it at the border.

    Args:
        height, width: of the last feature map.
        generator: source of randomness; the module `random` if not given.
    """
    generator = generator or random
    side = (1 - generator.betavariate(1, 1)) ** 0.5
    limits = []
    for size in (height, width):
        half, centre = int(size * side) // 2, generator.randrange(size)
        limits.append((max(centre - half, 0), min(centre + half, size)))
    (top, bottom), (left, right) = limits
    return top, left, bottom, right


def swap_box(feature_map: torch.Tensor, box: Box) -> torch.Tensor:
    """Swap a box of each map with that of the batch in reverse order; twice is nothing.

    Args:
        feature_map: `(batch, channels, height, width)`.
        box: in positions of the map.
    """
    top, left, bottom, right = box
    mixed = feature_map.clone()
    mixed[:, :, top:bottom, left:right] = feature_map.flip(0)[:, :, top:bottom, left:right]
    return mixed


@contextmanager
def mixed_tokens(model: RMTForImageClassification, box: Box) -> Iterator[None]:
    """Context in which the model mixes the maps after the stem; its `token_logits` are still mixed.

    Args:
        model: the model, without wrappers.
        box: in positions of the last feature map.
    """
    inside = tuple(_stem_cells(model) * limit for limit in box)
    with model.rmt.embeddings.register_forward_hook(lambda module, inputs, stem: swap_box(stem, inside)):
        yield


def unmix_token_logits(token_logits: torch.Tensor, box: Box, width: int) -> torch.Tensor:
    """Give the scores of positions, `(batch, positions, labels)`, back to their images.

    Args:
        token_logits: of a call under [`mixed_tokens`].
        box: the same box.
        width: of the last feature map.
    """
    scores = token_logits.unflatten(1, (-1, width)).permute(0, 3, 1, 2)
    return swap_box(scores, box).flatten(2).transpose(1, 2)


def token_labeling_loss(
    class_logits: torch.Tensor,
    token_logits: torch.Tensor,
    targets: torch.Tensor,
    box: Box | None = None,
    class_weight: float = 1.0,
    token_weight: float = 0.5,
    with_ground_truth: bool = False,
) -> torch.Tensor:
    """The loss of the official code, for soft targets.

    Args:
        class_logits: `(batch, labels)`.
        token_logits: `(batch, positions, labels)`, each with its own image.
        targets: `(batch, labels)`, of an image and of each of its positions; or `(batch, labels, 2 + positions)`: the ground
            truth, what a teacher says of the image, and what it says of each position.
        box: the box that was swapped, none if there was none.
        class_weight, token_weight: weights of the two losses.
        with_ground_truth: mix the ground truth into the teacher's targets of an image: half of each where both agree on the
            label, else a tenth of the ground truth.

    Raises:
        ValueError: if the shapes do not fit.
    """
    batch, positions, labels = token_logits.shape
    shapes = [(batch, labels), (batch, labels, 2 + positions)]
    if tuple(targets.shape) not in shapes:
        raise ValueError(f"targets must have the shape {shapes[0]} or {shapes[1]}, got {tuple(targets.shape)}.")
    if targets.ndim == 2:
        if with_ground_truth:
            raise ValueError(
                "with_ground_truth needs targets with a ground truth, of shape (batch, labels, 2 + positions)."
            )
        of_images, of_tokens = targets, targets[:, None].expand(-1, positions, -1)
    else:
        truth, of_images, of_tokens = targets[..., 0], targets[..., 1], targets[..., 2:].transpose(1, 2)
        if with_ground_truth:
            agree = of_images.argmax(-1, keepdim=True) == truth.argmax(-1, keepdim=True)
            share = torch.where(agree, 0.5, 0.9)
            of_images = share * of_images + (1 - share) * truth
    if box is not None:
        top, left, bottom, right = map(int, box)
        kept = 1 - (bottom - top) * (right - left) / positions
        of_images = kept * of_images + (1 - kept) * of_images.flip(0)
    image_loss = -(of_images * class_logits.log_softmax(-1)).sum(-1).mean()
    token_loss = -(of_tokens * token_logits.log_softmax(-1)).sum(-1).mean()
    return class_weight * image_loss + token_weight * token_loss


def mixed_token_labeling(
    model: torch.nn.Module,
    unwrapped: RMTForImageClassification,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    token_targets: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    with_ground_truth: bool = False,
) -> tuple[torch.Tensor, ModelOutput]:
    """A training step: two images share a map, and each position has the label of its image, or its own.

    Args:
        model: the model as it is called, with its wrappers.
        unwrapped: the model.
        pixel_values: `(batch, channels, height, width)`.
        labels: classes `(batch,)`, or soft targets `(batch, labels)`.
        token_targets: what a teacher says of each image and of each position, `(batch, labels, 1 + positions)`.
        label_smoothing: share of the targets that is spread over all labels.
        with_ground_truth: see [`token_labeling_loss`].

    Returns:
        The loss, and the outputs, whose `token_logits` are mixed.
    """
    num_labels = unwrapped.num_labels
    targets = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, num_labels)
    if token_targets is not None:
        targets = torch.cat([targets[..., None], token_targets], dim=-1)
    targets = (1 - label_smoothing) * targets.to(torch.float32) + label_smoothing / num_labels
    height, width = position_grid(unwrapped, pixel_values)
    box = draw_box(height, width)
    with mixed_tokens(unwrapped, box):
        outputs = model(pixel_values=pixel_values)
    token_logits = unmix_token_logits(outputs.token_logits, box, width)
    loss = token_labeling_loss(outputs.logits, token_logits, targets, box, with_ground_truth=with_ground_truth)
    return loss, outputs


__all__ = [
    "Box",
    "draw_box",
    "mixed_token_labeling",
    "mixed_tokens",
    "position_grid",
    "swap_box",
    "token_labeling_loss",
    "unmix_token_logits",
]
