"""Image preprocessing of the published models, by transformers' own image processors."""

from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:
    from transformers import BitImageProcessor, PreTrainedConfig


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImagePreprocessingMixin:
    """Tells how the official code prepares images for a configuration's model.

    Attributes:
        image_mean, image_std: normalisation of each channel, for pixels in 0..1.
        crop_ratio: side of the centre crop over the shortest side of the resized image; `None` to resize to `image_size`
            without a crop.
    """

    image_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    image_std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    crop_ratio: float | None = 0.875

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size`, which is one number for square images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def resized_edge(self) -> int:
        """Shortest side that images are resized to before the crop to `image_size`."""
        return int(max(self.image_height_width) / self.crop_ratio)


def image_processor_for(config: "PreTrainedConfig") -> "BitImageProcessor":
    """The image processor that the official evaluation of a model corresponds to.

    Bicubic resize of the shortest side and centre crop to `config.image_size`, or resize of both sides; normalisation.
    Saved beside a model with `save_pretrained`, it is found by `AutoImageProcessor` and by pipelines.

    Args:
        config: configuration of an image family.

    Raises:
        ValueError: if the configuration is not of an image family of this package.
        ImportError: if torchvision or Pillow is missing.
    """
    from transformers import BitImageProcessor
    from transformers.utils import is_torchvision_available, is_vision_available

    if not isinstance(config, ImagePreprocessingMixin):
        raise ValueError(
            f"{type(config).__name__} does not say how its images are prepared. Use the image processor saved with the "
            "model: `AutoImageProcessor.from_pretrained(...)`."
        )
    if not (is_torchvision_available() and is_vision_available()):
        raise ImportError("Image processors need torchvision and Pillow: `pip install 'hf_attn[vision]'`.")
    height, width = config.image_height_width
    image_size = {"height": height, "width": width}
    return BitImageProcessor(
        size=image_size if config.crop_ratio is None else {"shortest_edge": config.resized_edge},
        do_center_crop=config.crop_ratio is not None,
        crop_size=image_size,
        do_convert_rgb=config.num_channels == 3,
        resample=3,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )
