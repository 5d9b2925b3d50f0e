"""Pipeline `image-restoration`: super-resolution and restoration of images of any size."""

from collections.abc import Callable

import torch
from transformers import Pipeline
from transformers.utils import logging

from hf_attn.architectures.restoration import memory
from hf_attn.architectures.restoration.configuration import ImageRestorationConfig
from hf_attn.pipelines.heads import check_head
from hf_attn.restoration import tiling
from hf_attn.restoration.images import DecodedImage, decode_frames, encode_image, resize_alpha


#: BT.601 luma, as Pillow converts RGB to grey
_GREY = (0.299, 0.587, 0.114)


class ImageRestorationPipeline(Pipeline):
    """Restores or enlarges images with a model of `AutoModelForImageToImage` (HAT, DRCT, Swin2SR).

        pipe = pipeline("image-restoration", model="...")
        pipe("photo.jpg").save("large.png")
        pipe(["a.png", "b.webp"], max_memory="2GB", blend="feather")

    An image is a Pillow image, a path, a URL or an array (see [`hf_attn.restoration.images.decode_image`]), or a list of
    them; sizes may differ and start at 1x1. The result is a Pillow image of exactly `scale` times the size. EXIF orientation
    is applied; grey images stay grey; an alpha channel is enlarged beside the image; depth is kept: grey 16-bit images come
    back as Pillow's `I;16`, and 16-bit colour and floating images, for which Pillow has no mode, as arrays. Colour profile,
    dpi and the duration of a frame are in `info` of the result; some formats save them only if they are passed to `save`.
    Of an animation or a file of several pages the result is the list of all frames; of photographs with previews (MPO) the
    photograph, with a warning.

    Parameters, for the call or the constructor:

    - **tile** (`int`): side of the tiles, a multiple of the model's window. The whole image at once if not given.
    - **max_memory** (`str` or `int`): choose the largest tile for which model, image, result and activations fit, as an
      estimate: `"2GB"`, `"500MiB"` or bytes.
    - **tile_overlap** (`int`, 32): with `"cut"` each tile is extended this far into its neighbours; else what they share.
    - **blend** (`str`, `"cut"`): `"cut"`, `"mean"` or `"feather"`; see [`hf_attn.restoration.tiling.restore_bands`].
    - **padding** (`str`, `"reflect"`): how sides are padded to multiples of the window; `"symmetric"` as DRCT's inference
      script and Swin2SR's image processor do. The padding is cut off the result.
    - **batch_size** (`int`, 1): tiles that go through the model together.
    - **self_ensemble** (`bool`): average over the eight flips and rotations; eight times the work.
    - **timeout** (`float`): seconds to wait for a URL.

    Half precision (`dtype=torch.bfloat16`) halves the memory. A progress bar counts tiles if there are several.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_head(self.model)
        # A model object may come from its training: drop path would make each call another image.
        self.model.eval()

    def __call__(self, inputs, batch_size: int | None = None, **kwargs):
        """Restore an image or a list of images; see the class for the parameters."""
        if batch_size is None:
            batch_size = 1 if self._batch_size is None else self._batch_size
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a number of tiles, at least 1; got {batch_size!r}.")
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        # A batch is made of tiles, which have one shape, and not of images.
        return super().__call__(inputs, batch_size=1, tile_batch_size=batch_size, **kwargs)

    def _sanitize_parameters(self, timeout=None, **kwargs):
        known = ("tile", "max_memory", "tile_overlap", "blend", "padding", "self_ensemble", "tile_batch_size")
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise TypeError(
                f"image-restoration has no parameter {', '.join(unknown)}. Parameters: {', '.join(known[:-1])}."
            )
        forward = {name: value for name, value in kwargs.items() if value is not None}
        return ({} if timeout is None else {"timeout": timeout}), forward, {}

    def preprocess(self, image, timeout: float | None = None) -> dict:
        return {"frames": decode_frames(image, timeout)}

    def _forward(self, inputs: dict, **parameters) -> dict:
        return {"frames": [self._restore(frame, **parameters) for frame in inputs["frames"]]}

    def _restore(
        self,
        image: DecodedImage,
        tile: int | None = None,
        max_memory: str | int | None = None,
        tile_overlap: int = 32,
        blend: str = "cut",
        padding: str = "reflect",
        self_ensemble: bool = False,
        tile_batch_size: int = 1,
    ) -> dict:
        config = self.model.config
        channels, height, width = image.colour.shape
        tiling.check_tiles(tile, tile_overlap, blend, config.window_size)
        if tile is not None and max_memory is not None:
            raise ValueError("tile and max_memory both set the tile size: pass only one of them.")
        if tile is None:
            tile = self._choose_tile(image, max_memory, tile_overlap, blend, tile_batch_size)

        restore = self._network(channels)
        scale = config.upscale
        result = torch.empty(scale * height, scale * width, channels, dtype=image.colour.dtype)
        total = tiling.count_tiles(height, width, config.window_size, tile, tile_overlap, blend, padding)
        with logging.tqdm(total=total, unit="tile", disable=total == 1) as progress:
            bands = tiling.restore_bands(
                tiling.self_ensemble(restore) if self_ensemble else restore,
                image.colour[None],
                scale,
                config.window_size,
                tile=tile,
                tile_overlap=tile_overlap,
                blend=blend,
                padding=padding,
                batch_size=tile_batch_size,
                prepare=lambda tiles: (tiles / image.peak).to(self.device),
                on_tile=progress.update,
            )
            for first_row, band in bands:
                result[first_row : first_row + band.shape[1]] = image.quantise(band).permute(1, 2, 0)
        alpha = None if image.alpha is None else resize_alpha(image.alpha, scale, image.peak)
        return {"colour": result, "alpha": alpha, "peak": image.peak, "info": image.info}

    def postprocess(self, outputs: dict):
        images = [encode_image(**frame) for frame in outputs["frames"]]
        return images if len(images) > 1 else images[0]

    def _choose_tile(
        self, image: DecodedImage, max_memory: str | int | None, overlap: int, blend: str, batch_size: int
    ) -> int | None:
        channels, height, width = image.colour.shape
        if max_memory is None:
            budget = memory.available_memory(self.device)
        else:
            budget = memory.parse_memory(max_memory)
        tile = memory.largest_tile(
            self.model,
            height,
            width,
            channels,
            image.colour.element_size(),
            budget,
            overlap,
            blend,
            batch_size,
        )
        if max_memory is None and tile is not None:
            raise ValueError(
                f"An image of {height}x{width} at once takes more than the {budget / 1e9:.1f} GB that are free. Use "
                f"tiles: tile={min(tile, 256)}, or max_memory with a budget such as '{budget / 2e9:.1f}GB'."
            )
        return tile

    def _network(self, image_channels: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model as a function of images in [0, 1] with as many channels as the image has."""
        channels = self.model.config.num_channels
        # The shell of our families subtracts the mean before it casts, which keeps more of the image.
        dtype = torch.float32 if isinstance(self.model.config, ImageRestorationConfig) else self.model.dtype

        def restore(tiles: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=tiles.to(dtype)).reconstruction.float()

        if channels == image_channels:
            return restore
        if channels == 1:
            return lambda tiles: restore(tiles.flatten(0, 1)[:, None]).unflatten(0, tiles.shape[:2])[:, :, 0]
        if channels == 3:
            return lambda tiles: torch.einsum(
                "bchw,c->bhw", restore(tiles.expand(-1, 3, -1, -1)), tiles.new_tensor(_GREY)
            )[:, None]
        raise ValueError(f"The model has {channels} channels; only 1 (greyscale) and 3 (RGB) are supported.")
