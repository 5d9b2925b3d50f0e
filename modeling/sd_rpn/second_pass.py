"""The second pass of SD-RPN: prompts in which the tokens of a crop follow those of its image, for a plain `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import BaseImageProcessor, LlavaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .first_pass import ImageCells, execution_device


if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EncodedImage:
    """An image or a crop as the language model gets it.

    Attributes:
        features: `(tokens, hidden_size)`.
        grid: rows and columns of its tokens; for an image of LLaVA-Next those of the view of the whole image.
        kept: `(tokens,)`, which of them enter the prompt.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    kept: torch.Tensor

    @classmethod
    def whole(cls, features: torch.Tensor, grid: tuple[int, int]) -> "EncodedImage":
        """With all of its tokens."""
        return cls(features, grid, features.new_ones(len(features), dtype=torch.bool))

    def keep(self, kept: torch.Tensor) -> "EncodedImage":
        """With these tokens only."""
        return EncodedImage(self.features, self.grid, kept.to(self.kept.device))


@torch.no_grad()
def encode_crops(
    base: PreTrainedModel, image_processor: BaseImageProcessor, crops: Sequence["Image"]
) -> list[EncodedImage]:
    """Encode crops by the base's vision tower and projector.

    LLaVA: resized to the square input of the vision tower, for any shape. Qwen2.5-VL: with the image processor's pixel
    budget.
    """
    if not crops:
        return []
    vision, device = base.config.vision_config, execution_device(base)
    if base.config.model_type == "qwen2_5_vl":
        inputs = image_processor(images=list(crops), return_tensors="pt").to(device)
        features = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        merge = vision.spatial_merge_size
        grids = [(rows // merge, columns // merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    else:
        from PIL import Image

        squares = [crop.resize((vision.image_size,) * 2, Image.Resampling.BILINEAR) for crop in crops]
        pixel_values = image_processor(images=squares, return_tensors="pt")["pixel_values"].to(device)
        if pixel_values.ndim == 5:
            # The tiles of LLaVA-Next follow the view of the whole crop.
            pixel_values = pixel_values[:, 0]
        # LLaVA-Next has the same modules, and a method of its own that wants tiles.
        features = LlavaModel.get_image_features(base.model, pixel_values=pixel_values).pooler_output
        grids = [(vision.image_size // vision.patch_size,) * 2] * len(crops)
    return [EncodedImage.whole(feature, grid) for feature, grid in zip(features, grids, strict=True)]


def second_pass_inputs(
    base: PreTrainedModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    images: Sequence[ImageCells],
    encoded: Sequence[EncodedImage],
    crops: Sequence[Sequence[EncodedImage]],
    pad_token_id: int,
) -> dict:
    """Inputs for the base's `generate`: the tokens of each image's crops follow its own, and prompts are padded on the left.

    For Qwen2.5-VL a crop stands between its start and end tokens; positions are those of the whole crop, before tokens that
    are not kept are taken out.

    Args:
        base: the base.
        input_ids, attention_mask: `(batch, sequence)`, of the first pass.
        images: positions of the images.
        encoded: the images, encoded.
        crops: the crops of each image, encoded.
        pad_token_id: fills up shorter prompts; not the image token.

    Returns:
        `input_ids` and `attention_mask`, `(batch, new sequence)`; `mm_encoder_outputs` with the features of all images and
        crops, if there are any; `position_ids`, `(4, batch, new sequence)`, for Qwen2.5-VL.
    """
    rows = []
    for row, mask in enumerate(attention_mask.bool()):
        in_row = [index for index, image in enumerate(images) if image.row == row]
        prompt = _Prompt(base, input_ids[row], mask)
        for index in in_row:
            prompt.add_image(images[index], encoded[index], crops[index])
        rows.append(prompt.finish())

    length = max(len(row.input_ids) for row in rows)

    def padded(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (length - tensor.shape[-1], 0), value=value)

    inputs = {
        "input_ids": torch.stack([padded(row.input_ids, pad_token_id) for row in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(row.input_ids), 0) for row in rows]),
    }
    if base.config.model_type == "qwen2_5_vl":
        inputs["position_ids"] = torch.stack([padded(row.position_ids, 0) for row in rows], dim=1)
    features = [feature for row in rows for feature in row.features]
    if features:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    return inputs


@dataclass(frozen=True)
class _Row:
    """A prompt of the second pass: `input_ids` `(tokens,)`, `position_ids` `(4, tokens)` for Qwen2.5-VL, and features."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    features: list[torch.Tensor]


class _Prompt:
    """A prompt of the second pass in the making."""

    def __init__(self, base: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor):
        self.base = base
        self.config = base.config
        self.source, self.mask = input_ids, mask
        self.done = 0
        self.ids: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        self.features: list[torch.Tensor] = []
        self.grids: list[tuple[int, int]] = []

    def add_image(self, cells: ImageCells, image: EncodedImage, crops: Sequence[EncodedImage]) -> None:
        """Copy the prompt to the end of an image, and add its crops."""
        self._copy(cells.start)
        self._add_encoded(image)
        self.done = cells.start + cells.num_tokens
        for crop in crops:
            is_qwen = self.config.model_type == "qwen2_5_vl"
            if is_qwen:
                self._add(self.source.new_tensor([self.config.vision_start_token_id]))
            self._add_encoded(crop)
            if is_qwen:
                self._add(self.source.new_tensor([self.config.vision_end_token_id]))

    def finish(self) -> _Row:
        """Copy the rest, and take out the tokens that are not kept."""
        self._copy(len(self.source))
        ids, kept = torch.cat(self.ids), torch.cat(self.kept)
        position_ids = self._position_ids(ids, kept) if self.config.model_type == "qwen2_5_vl" else None
        return _Row(ids[kept], position_ids, self.features)

    def _copy(self, end: int) -> None:
        begin, self.done = self.done, end
        self._add(self.source[begin:end][self.mask[begin:end]])

    def _add_encoded(self, image: EncodedImage) -> None:
        self._add(self.source.new_full((len(image.features),), self.config.image_token_id), image.kept)
        self.features.append(image.features[image.kept])
        self.grids.append(image.grid)

    def _add(self, ids: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        self.ids.append(ids)
        kept = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept
        self.kept.append(kept.to(ids.device))

    def _position_ids(self, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`(4, kept tokens)`: positions in the text, and in time, height and width."""
        merge = self.config.vision_config.spatial_merge_size
        grids = ids.new_tensor([(1, rows * merge, columns * merge) for rows, columns in self.grids])
        positions, _ = self.base.model.get_rope_index(
            ids[None],
            mm_token_type_ids=(ids == self.config.image_token_id).int()[None],
            image_grid_thw=grids if self.grids else None,
        )
        text = torch.arange(int(kept.sum()), device=ids.device)[None]
        return torch.cat([text, positions[:, 0, kept]])
