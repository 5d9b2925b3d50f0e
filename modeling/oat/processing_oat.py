"""Images, boxes and fixations -> what OAT reads, and its scanpaths -> objects."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from hf_attn.restoration.images import ImageLike, decode_image

from .configuration_oat import OATConfig
from .layout import check_boxes, grid_positions, object_of_box, objects_at


class OATImageProcessor(BaseImageProcessor):
    """Cuts scenes into the images of their objects, RGB in [0, 1], and counts rows and columns.

        processor = OATImageProcessor()
        inputs = processor("shelf.png", boxes=boxes, target_index=5)
        ids = model.generate(**inputs)
        scanpaths = processor.post_process_scanpaths(ids, inputs)

    Objects keep the order of their boxes.

    Args:
        size (`dict`): `height` and `width` of the images of the objects. They are resized bilinearly, without antialiasing.
        row_height (`int`): see [`hf_attn.modeling.oat.layout.reading_order`].
    """

    model_input_names = ["pixel_values", "target_index", "object_positions", "object_mask"]

    def __init__(self, size: dict[str, int] | None = None, row_height: int = 10, **kwargs):
        super().__init__(**kwargs)
        self.size = dict(size) if size is not None else {"height": 150, "width": 93}
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"size must have height and width, got {self.size}.")
        self.row_height = row_height

    @classmethod
    def from_config(cls, config: OATConfig) -> "OATImageProcessor":
        """The processor of a model."""
        return cls(size={"height": config.crop_height, "width": config.crop_width})

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoImageProcessor"):
        """Do nothing: transformers would copy the source file into saved folders."""

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        boxes: Any,
        target_index: int | Sequence[int] | None = None,
        target_boxes: Any = None,
        fixations: Any = None,
        grid: tuple[int, int] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one scene or several.

        Args:
            images: an image, as [`hf_attn.restoration.images.decode_image`] takes it, or a list of them.
            boxes: boxes of the objects, x1, y1, x2, y2 in pixels: `(objects, 4)`, for a list of images a list of them.
            target_index: which of the objects is searched for; for a list of images one each.
            target_boxes: instead of the index a box, which means the object that shares most with it.
            fixations: points x, y in pixels of a scanpath, `(fixations, 2)`, for training; for a list of images one scanpath each.
            grid: rows and columns, if the objects fill a grid.
            return_tensors: only `"pt"`.

        Returns:
            `pixel_values` `(batch, objects, 3, height, width)`, `target_index` `(batch,)`, `object_positions`
            `(batch, objects, 2)`, with scenes of different size `object_mask` `(batch, objects)`, and with fixations `labels`
            `(batch, length)`, the objects and EOS.

        Raises:
            ValueError: for invalid images, boxes, targets or fixations; the message says which.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"OATImageProcessor returns only PyTorch tensors (return_tensors='pt'), got {return_tensors!r}."
            )
        if not isinstance(images, list | tuple):
            images, boxes = [images], [boxes]
            target_index, target_boxes, fixations = (
                [x] if x is not None else None for x in (target_index, target_boxes, fixations)
            )
        if not images:
            raise ValueError("There are no images.")
        if (target_index is None) == (target_boxes is None):
            raise ValueError("Pass the targets of the search: either target_index or target_boxes.")
        given = {"boxes": boxes, "target_index": target_index, "target_boxes": target_boxes, "fixations": fixations}
        for name, values in given.items():
            if values is not None and len(values) != len(images):
                raise ValueError(f"Got {len(images)} images but {len(values)} {name}; pass one per image.")

        scenes = []
        for index, image in enumerate(images):
            scene = {name: None if values is None else values[index] for name, values in given.items()}
            try:
                scenes.append(self._scene(image, grid=grid, **scene))
            except ValueError as error:
                where = f"Image {index}: " if len(images) > 1 else ""
                raise ValueError(f"{where}{error}") from error
        return BatchFeature(collate_scenes(scenes))

    def _scene(self, image, boxes, target_index, target_boxes, fixations, grid) -> dict[str, torch.Tensor]:
        pixels = self.read_image(image)
        boxes = check_boxes(boxes, *pixels.shape[1:])
        if target_boxes is not None:
            target_index = object_of_box(target_boxes, boxes)
        target_index = int(target_index)
        if not 0 <= target_index < len(boxes):
            raise ValueError(
                f"target_index {target_index} is out of range: there are {len(boxes)} boxes, counted from 0."
            )
        scene = {
            "pixel_values": self.crop(pixels, boxes),
            "target_index": torch.tensor(target_index),
            "object_positions": grid_positions(boxes, grid, self.row_height),
        }
        if fixations is not None:
            scene["scanpath"] = objects_at(fixations, boxes)
        return scene

    def read_image(self, image: ImageLike) -> torch.Tensor:
        """An image as `(3, height, width)` in [0, 1]; transparent pixels become white."""
        decoded = decode_image(image)
        pixels = decoded.colour.float() / decoded.peak
        if decoded.alpha is not None:
            alpha = decoded.alpha.float() / decoded.peak
            pixels = pixels * alpha + 1 - alpha
        return pixels.expand(3, -1, -1)

    def crop(self, pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The images of objects `(objects, 3, height, width)`."""
        size = (self.size["height"], self.size["width"])
        crops = [pixels[None, :, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes.tolist()]
        return torch.cat([torch.nn.functional.interpolate(crop, size, mode="bilinear") for crop in crops])

    def post_process_scanpaths(self, ids: torch.Tensor, inputs: BatchFeature) -> list[list[list[int]]]:
        """Generated ids as objects.

        Args:
            ids: what `generate` returned, `(batch * scanpaths, length)`.
            inputs: the inputs.

        Returns:
            For each scene its scanpaths, each a list of objects.
        """
        batch_size, num_objects = inputs["pixel_values"].shape[:2]
        scanpaths = [[index for index in row if index < num_objects] for row in ids.tolist()]
        each = len(scanpaths) // batch_size
        return [scanpaths[start : start + each] for start in range(0, len(scanpaths), each)]


def collate_scenes(scenes: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch of scenes, also of different numbers of objects.

    Args:
        scenes: `pixel_values`, `target_index`, `object_positions` and, if there are labels to be made, `scanpath`.
    """
    largest = max(len(scene["pixel_values"]) for scene in scenes)

    def padded(name: str) -> torch.Tensor:
        tensors = [scene[name] for scene in scenes]
        pads = [(0, 0) * (tensor.ndim - 1) + (0, largest - len(tensor)) for tensor in tensors]
        return torch.stack([torch.nn.functional.pad(*pair) for pair in zip(tensors, pads, strict=True)])

    batch = {
        "pixel_values": padded("pixel_values"),
        "target_index": torch.stack([scene["target_index"] for scene in scenes]),
        "object_positions": padded("object_positions"),
    }
    numbers = torch.tensor([len(scene["pixel_values"]) for scene in scenes])
    if (numbers < largest).any():
        batch["object_mask"] = torch.arange(largest) < numbers[:, None]
    if "scanpath" in scenes[0]:
        endings = [torch.cat([scene["scanpath"], torch.tensor([largest])]) for scene in scenes]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(endings, batch_first=True, padding_value=-100)
    return batch


__all__ = ["OATImageProcessor"]
