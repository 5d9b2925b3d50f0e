"""Image files, Pillow images and arrays -> tensors and back, without losing depth, alpha, greyness, orientation or profile."""

import io
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


try:
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
except ImportError as error:
    raise ImportError("Images are read with Pillow: `pip install 'hf_attn[vision]'`.") from error


#: types of images
ImageLike = Image.Image | np.ndarray | str | os.PathLike

#: metadata that is kept if the pixels of an image change, in addition to the colour profile
_KEPT = ("dpi", "duration")
#: number of channels -> colour space in the header of an ICC profile
_COLOUR_SPACES = {1: b"GRAY", 3: b"RGB "}
#: formats whose further images are previews and depth maps of the first
_WITH_PREVIEWS = ("MPO", "JPEG", "ICO", "ICNS")

_ORIENTATION = 0x0112
#: EXIF orientation -> whether rows and columns change places, then along which of them to flip
_TURNS = {2: (False, (-1,)), 3: (False, (-2, -1)), 4: (False, (-2,)), 5: (True, ()), 6: (True, (-1,))}
_TURNS |= {7: (True, (-2, -1)), 8: (True, (-2,))}


@dataclass(frozen=True)
class DecodedImage:
    """An image as numbers.

    Attributes:
        colour: `(channels, height, width)` with one channel (grey) or three (RGB), from 0 to `peak`.
        alpha: `(1, height, width)` like `colour`, or None.
        peak: 255 for 8 bits (uint8), 65535 for 16 bits (int32), 1 for floating images (float32).
        info: `icc_profile`, `dpi` and, of a frame, `duration`, as far as the image has them; as in Pillow's `info`.
    """

    colour: torch.Tensor
    alpha: torch.Tensor | None
    peak: int
    info: dict[str, Any] = field(default_factory=dict)

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """Values in [0, 1] at the depth of this image: clamped and, for whole numbers, rounded."""
        values = values.clamp(0, 1)
        return values if self.peak == 1 else (values * self.peak).round().to(self.colour.dtype)


def decode_image(image: ImageLike, timeout: float | None = None, name: str | None = None) -> DecodedImage:
    """Read an image; of an animation or a file of several pages the first one, with a warning.

    Args:
        image: a Pillow image; a path or a URL; the bytes of a file; or an array `(height, width)` or `(height, width,
            channels)` with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha) channels, of 8 bits, 16 bits, or
            floating in [0, 1].
        timeout: seconds to wait for a URL.
        name: what messages call it; the path if not given.

    Raises:
        ValueError: if the image is corrupt, empty or not understood.
        TypeError: if it is none of the above.
    """
    frames = decode_frames(image, timeout, name, only_first=True)
    return frames[0]


def decode_frames(
    image: ImageLike, timeout: float | None = None, name: str | None = None, only_first: bool = False
) -> list[DecodedImage]:
    """Read an image, and all frames of an animation or pages of a file.

    Arguments and errors as for [`decode_image`]; `only_first` leaves out what comes after the first, with a warning.
    """
    if isinstance(image, np.ndarray):
        return [_from_array(image)]
    if isinstance(image, Image.Image):
        if (count := getattr(image, "n_frames", 1)) > 1:
            warnings.warn(
                f"{name or 'The image'} has {count} frames or pages; only the current one is read. Pass the path to "
                "read all of them.",
                stacklevel=2,
            )
        return [_from_pillow(image, name or "The image")]
    if isinstance(image, str | os.PathLike):
        source = os.fspath(image)
        return _from_file(_read(source, timeout), name or source, only_first)
    if isinstance(image, bytes):
        return _from_file(image, name or "The image", only_first)
    raise TypeError(f"An image must be a Pillow image, a path, a URL, bytes or an array, got {type(image).__name__}.")


def as_rgb(image: ImageLike, name: str | None = None) -> Image.Image:
    """An RGB image of 8 bits without alpha; deeper images are scaled, where `Image.convert` would clip them.

    Arguments and errors as for [`decode_image`].
    """
    decoded = decode_image(image, name=name)
    colour = decoded.colour
    if decoded.peak != 255:
        colour = (colour / decoded.peak * 255).round().to(torch.uint8)
    return Image.fromarray(colour.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def encode_image(
    colour: torch.Tensor, alpha: torch.Tensor | None, peak: int, info: dict[str, Any] | None = None
) -> Image.Image | np.ndarray:
    """The inverse: a Pillow image, or an array `(height, width[, channels])` where Pillow has no mode of that depth.

    Args:
        colour: `(height, width, 1 or 3)`.
        alpha: `(height, width, 1)` or None.
        peak: as in [`DecodedImage`].
        info: what Pillow's `info` is to hold.
    """
    array = (colour if alpha is None else torch.cat((colour, alpha), dim=-1)).numpy()
    array = array[..., 0] if array.shape[-1] == 1 else array
    if peak == 65535:
        array = array.astype(np.uint16)
    if peak != 255 and array.ndim != 2:
        return array
    image = Image.fromarray(array)
    image.info.update(info or {})
    return image


def resize_alpha(alpha: torch.Tensor, scale: int, peak: int) -> torch.Tensor:
    """Enlarge an alpha channel `(1, height, width)`: bicubic, within its range. Returns `(height, width, 1)`."""
    if scale != 1:
        size = (scale * alpha.shape[2], scale * alpha.shape[1])
        mode = "L" if peak == 255 else "F"
        array = alpha[0].numpy() if mode == "L" else alpha[0].numpy().astype(np.float32)
        resized = np.array(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)).clip(0, peak)
        alpha = torch.from_numpy(resized if peak != 65535 else resized.round()).to(alpha.dtype)[None]
    return alpha.permute(1, 2, 0)


def _read(source: str, timeout: float | None) -> bytes:
    if source.startswith(("http://", "https://")):
        return _download(source, timeout)
    if not os.path.isfile(source):
        raise ValueError(f"There is no image file at {source}.")
    with open(source, "rb") as file:
        return file.read()


def _from_file(content: bytes, name: str, only_first: bool) -> list[DecodedImage]:
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read: it is corrupt or not an image.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read: it is corrupt or truncated ({error}).") from error
    if _has_16_bit_colour(image):
        return [_from_16_bit_png(image, content, name)]
    count = getattr(image, "n_frames", 1)
    if count > 1 and (only_first or image.format in _WITH_PREVIEWS):
        warnings.warn(f"{name} has {count} frames or pages; only the first is read.", stacklevel=3)
        count = 1
    if count == 1:
        return [_from_pillow(image, name)]
    try:
        frames = [frame.copy() for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{name} cannot be read: one of its {count} frames is corrupt or truncated ({error})."
        ) from error
    return [_from_pillow(frame, f"{name}, frame {number},") for number, frame in enumerate(frames)]


def _from_16_bit_png(image: Image.Image, content: bytes, name: str) -> DecodedImage:
    if image.format != "PNG":
        raise ValueError(
            f"{name} has 16 bits per channel, which Pillow would reduce to 8. Read it with another library and pass "
            "the array."
        )
    try:
        from torchvision.io import ImageReadMode, decode_png
    except ImportError as error:
        raise ImportError(
            f"{name} is a PNG of 16 bits per channel, which torchvision reads: pip install 'hf_attn[vision]'."
        ) from error
    try:
        content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        pixels = decode_png(content, ImageReadMode.UNCHANGED).to(torch.int32)
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be read: it is corrupt or truncated ({error}).") from error
    swap, flips = _TURNS.get(image.getexif().get(_ORIENTATION), (False, ()))
    pixels = pixels.transpose(-2, -1) if swap else pixels
    return _split_alpha(pixels.flip(flips) if flips else pixels, 65535, image.info)


def _download(url: str, timeout: float | None) -> bytes:
    from huggingface_hub import get_session

    response = get_session().get(url, timeout=timeout)
    response.raise_for_status()
    return response.content


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Whether Pillow will keep only 8 of 16 bits; known only as long as it has not loaded the pixels."""
    if image.mode.startswith(("I", "F")):
        return False
    for *_, arguments in getattr(image, "tile", ()):
        mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
        if isinstance(mode, str) and ";16" in mode:
            return True
    return False


def _from_pillow(image: Image.Image, name: str) -> DecodedImage:
    if 0 in image.size:
        raise ValueError(f"{name} is empty: {image.size[0]}x{image.size[1]}.")
    if _has_16_bit_colour(image):
        raise ValueError(
            f"{name} has 16 bits per channel, which Pillow would reduce to 8. Pass its path, or an array."
        )
    info = image.info
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: it is corrupt or truncated ({error}).") from error
    if image.mode.startswith("I"):
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"{name} has values from {array.min()} to {array.max()}, which is outside the range of 16 bits."
            )
        return _from_array(array.astype(np.uint16), info)
    if image.mode == "F":
        return _from_array(np.array(image), info)
    transparent = image.has_transparency_data
    if image.mode in ("1", "L", "LA", "La"):
        image = image.convert("LA" if transparent else "L")
    else:
        image = image.convert("RGBA" if transparent else "RGB")
    return _from_array(np.array(image), info)


def _from_array(array: np.ndarray, info: dict[str, Any] | None = None) -> DecodedImage:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"An array must have the shape (height, width) or (height, width, 1 to 4 channels), got {array.shape}."
        )
    if array.size == 0:
        raise ValueError(f"The image is empty: its shape is {array.shape}.")
    if array.dtype == np.uint8:
        values, peak = array, 255
    elif array.dtype == np.uint16:
        values, peak = array.astype(np.int32), 65535
    elif np.issubdtype(array.dtype, np.floating):
        values, peak = array.astype(np.float32), 1
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"A floating-point image must be in [0, 1], got values from {array.min()} to {array.max()} (or NaN)."
            )
    else:
        raise ValueError(f"An array must be uint8, uint16 or floating-point, got {array.dtype}.")
    # PyTorch shares the memory, and has no read-only tensors.
    values = np.require(values, requirements=("C", "W"))
    return _split_alpha(torch.from_numpy(values).permute(2, 0, 1), peak, info or {})


def _split_alpha(pixels: torch.Tensor, peak: int, info: dict[str, Any]) -> DecodedImage:
    has_alpha = len(pixels) in (2, 4)
    colour = (pixels[:-1] if has_alpha else pixels).contiguous()
    kept = {name: info[name] for name in _KEPT if name in info}
    profile = info.get("icc_profile")
    # Of an image that was converted (CMYK, YCCK) the profile describes numbers that are gone.
    if profile and bytes(profile[16:20]) == _COLOUR_SPACES[len(colour)]:
        kept["icc_profile"] = profile
    return DecodedImage(colour, pixels[-1:].contiguous() if has_alpha else None, peak, kept)
