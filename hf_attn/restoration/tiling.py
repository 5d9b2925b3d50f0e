"""Restores an image in tiles, band by band, so that memory depends on the tile and not on the image."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..architectures.restoration.layers import pad_to_multiple


BLENDS = ("cut", "mean", "feather")

#: `(batch, channels, height, width)` -> `(batch, channels, scale * height, scale * width)`
Restore = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in input pixels.

    Attributes:
        start, stop: range of the input of the network.
        keep_start, keep_stop: range of its output that is used.
        ramp_in, ramp_out: over how many pixels the weight rises and falls at the two ends.
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int
    ramp_in: int = 0
    ramp_out: int = 0

    def weight(self, scale: int) -> torch.Tensor:
        """Weights of the output pixels that are used, not yet normalised over the tiles."""
        size = scale * (self.keep_stop - self.keep_start)
        position = torch.arange(size) + 0.5
        weight = torch.ones(size)
        if self.ramp_in:
            weight = torch.minimum(weight, position / (scale * self.ramp_in))
        if self.ramp_out:
            weight = torch.minimum(weight, (size - position) / (scale * self.ramp_out))
        return weight


def spans(size: int, tile: int | None, overlap: int, blend: str) -> list[Span]:
    """Tiles along an axis.

    Args:
        size: length of the axis.
        tile: with `"cut"` the step between tiles, else their length; None for one tile.
        overlap: with `"cut"` how far a tile is extended into its neighbours, else what neighbours share.
        blend: one of [`BLENDS`].
    """
    if tile is None or tile >= size:
        return [Span(0, size, 0, size)]
    if blend == "cut":
        return [
            Span(max(start - overlap, 0), min(start + tile + overlap, size), start, min(start + tile, size))
            for start in range(0, size, tile)
        ]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    ramp = overlap if blend == "feather" else 0
    return [
        Span(start, start + tile, start, start + tile, ramp if start else 0, ramp if start + tile < size else 0)
        for start in starts
    ]


def check_tiles(tile: int | None, overlap: int, blend: str, multiple: int) -> None:
    """Raise `ValueError` for tile sizes that the network or the blending does not support."""
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}.")
    if not isinstance(overlap, int):
        raise ValueError(f"tile_overlap must be an integer number of pixels, got {overlap!r}.")
    if tile is None:
        if overlap < 0:
            raise ValueError(f"tile_overlap cannot be negative, got {overlap}.")
        return
    if not isinstance(tile, int):
        raise ValueError(f"tile must be an integer number of pixels, got {tile!r}.")
    if tile < 1 or tile % multiple:
        nearest = max(round(tile / multiple), 1) * multiple
        raise ValueError(
            f"tile must be a positive multiple of the model's window, {multiple}; got {tile}. Try {nearest}."
        )
    if overlap < 0:
        raise ValueError(f"tile_overlap cannot be negative, got {overlap}.")
    if blend == "cut" and overlap % multiple:
        raise ValueError(
            f"With blend='cut', tile_overlap must be a multiple of the window, {multiple}; got {overlap}."
        )
    if blend != "cut" and overlap >= tile:
        raise ValueError(f"tile_overlap ({overlap}) must be smaller than tile ({tile}) with blend={blend!r}.")


def restore_bands(
    restore: Restore,
    image: torch.Tensor,
    scale: int,
    multiple: int,
    *,
    tile: int | None = None,
    tile_overlap: int = 32,
    blend: str = "cut",
    padding: str = "reflect",
    batch_size: int = 1,
    prepare: Restore | None = None,
    on_tile: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Restore an image and yield the finished rows from top to bottom.

    Tiles are cut from the padded image. The channel attention of HAT averages over what the network sees, so a tiled
    result is never quite that of the whole image; a tile that covers the image gives exactly the untiled result.

    Args:
        restore: the network.
        image: `(1, channels, height, width)`.
        scale: scale of the network.
        multiple: the image is padded to multiples of it.
        tile: side of the tiles (see [`spans`]), a multiple of `multiple`; None for the whole image at once.
        tile_overlap: overlap of the tiles.
        blend: `"cut"` extends each tile and cuts the extension off the result, `"mean"` averages overlapping tiles,
            `"feather"` averages them with weights that fall linearly towards the borders of a tile.
        padding: mode of [`~hf_attn.architectures.restoration.layers.pad_to_multiple`].
        batch_size: how many neighbouring tiles of one shape go through the network at once.
        prepare: turns a batch of tiles into what `restore` takes.
        on_tile: called with the number of tiles that have just been done.

    Yields:
        `(first row, (channels, rows, scale * width))` on the CPU, together the `(scale * height, scale * width)` result.

    Raises:
        ValueError: for tiles or a blending that do not work, or if the network is of another scale.
    """
    check_tiles(tile, tile_overlap, blend, multiple)
    height, width = image.shape[-2:]
    image = pad_to_multiple(image, multiple, padding)
    bands = spans(image.shape[-2], tile, tile_overlap, blend)
    columns = spans(image.shape[-1], tile, tile_overlap, blend)
    row_weights = _normalised(bands, image.shape[-2], scale)
    column_weights = _normalised(columns, image.shape[-1], scale)
    out_height, out_width = scale * height, scale * width

    rest, done = None, 0
    for index, (band, row_weight) in enumerate(zip(bands, row_weights, strict=True)):
        result = None
        for batch in _batches(columns, batch_size):
            tiles = torch.cat([image[..., band.start : band.stop, columns[j].start : columns[j].stop] for j in batch])
            restored = restore(prepare(tiles) if prepare else tiles)
            if restored.shape[-2:] != (scale * tiles.shape[-2], scale * tiles.shape[-1]):
                raise ValueError(
                    f"The network returned {tuple(restored.shape[-2:])} for an input of {tuple(tiles.shape[-2:])}, "
                    f"which does not match upscale={scale}: the configuration does not belong to the checkpoint."
                )
            if result is None:
                rows = scale * (band.keep_stop - band.keep_start)
                result = restored.new_zeros(restored.shape[1], rows, scale * image.shape[-1], device="cpu")
            for part, j in zip(restored.to("cpu"), batch, strict=True):
                column = columns[j]
                part = part[
                    :,
                    scale * (band.keep_start - band.start) : scale * (band.keep_stop - band.start),
                    scale * (column.keep_start - column.start) : scale * (column.keep_stop - column.start),
                ]
                result[:, :, scale * column.keep_start : scale * column.keep_stop] += part * column_weights[j]
            if on_tile:
                on_tile(len(batch))
        result *= row_weight[:, None]
        if rest is not None:
            result[:, : rest.shape[1]] += rest
        stop = scale * (bands[index + 1].keep_start if index + 1 < len(bands) else image.shape[-2])
        rest = result[:, stop - done :]
        yield done, result[:, : min(stop, out_height) - done, :out_width]
        done = stop
        if done >= out_height:
            # The other bands contain only padding.
            break


def restore_image(restore: Restore, image: torch.Tensor, scale: int, multiple: int, **options) -> torch.Tensor:
    """Restore an image at once; see [`restore_bands`]. Returns `(1, channels, scale * height, scale * width)`."""
    return torch.cat([band for _, band in restore_bands(restore, image, scale, multiple, **options)], dim=1)[None]


def count_tiles(
    height: int, width: int, multiple: int, tile: int | None, overlap: int, blend: str, padding: str
) -> int:
    """Number of tiles of [`restore_bands`] for an image."""
    padded = [
        size + (-size % multiple if padding == "reflect" else multiple - size % multiple) for size in (height, width)
    ]
    return len(spans(padded[0], tile, overlap, blend)) * len(spans(padded[1], tile, overlap, blend))


def self_ensemble(restore: Restore) -> Restore:
    """The average over the eight flips and rotations of the input (learned position biases make them differ)."""

    def restore_all(images: torch.Tensor) -> torch.Tensor:
        total = 0
        for quarter_turns in range(4):
            for flip in (False, True):
                turned = images.rot90(quarter_turns, (-2, -1))
                restored = restore(turned.flip(-1) if flip else turned)
                restored = restored.flip(-1) if flip else restored
                total = total + restored.rot90(-quarter_turns, (-2, -1))
        return total / 8

    return restore_all


def _normalised(tiles: list[Span], size: int, scale: int) -> list[torch.Tensor]:
    """Weights that sum to one at each output pixel."""
    total = torch.zeros(scale * size)
    weights = [tile.weight(scale) for tile in tiles]
    for tile, weight in zip(tiles, weights, strict=True):
        total[scale * tile.keep_start : scale * tile.keep_stop] += weight
    return [
        weight / total[scale * tile.keep_start : scale * tile.keep_stop]
        for tile, weight in zip(tiles, weights, strict=True)
    ]


def _batches(columns: list[Span], batch_size: int) -> Iterator[list[int]]:
    """Indices of neighbouring tiles of one width, at most `batch_size` together."""
    batch: list[int] = []
    for index, column in enumerate(columns):
        if batch and (
            len(batch) == batch_size or column.stop - column.start != columns[batch[0]].stop - columns[batch[0]].start
        ):
            yield batch
            batch = []
        batch.append(index)
    yield batch
