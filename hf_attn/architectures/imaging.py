"""Image preprocessing of the published models, by transformers' own image processors."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .variants import VariantsMixin


if TYPE_CHECKING:
    from transformers import BitImageProcessor, PreTrainedConfig


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImagePreprocessingMixin:
    """Image preprocessing of the official code.

    Attributes:
        image_mean, image_std: normalisation of each channel, for pixels in 0..1.
        crop_ratio: side of the centre crop over the shortest side of the resized image; `None` to resize to `image_size`
            without a crop.
    """

    image_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    image_std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    crop_ratio: float | None = 0.875

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """`image_mean` and `image_std` for each of `num_channels`; for other images than RGB their averages."""
        mean, std = (
            list(values) if len(values) == self.num_channels else [sum(values) / len(values)] * self.num_channels
            for values in (self.image_mean, self.image_std)
        )
        return mean, std

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size`, which is one number for square images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def resized_edge(self) -> int:
        """Shortest side that images are resized to before the crop to `image_size`."""
        return int(max(self.image_height_width) / self.crop_ratio)


@cache
def imagenet_names() -> tuple[str, ...] | None:
    """Names of the 1,000 classes of ImageNet, in order, as transformers' own configurations have them.

    They are taken from timm; empty if timm is not installed.
    """
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        return None
    folder = Path(timm.origin).parent / "data" / "_info"
    synsets, lemmas = folder / "imagenet_synsets.txt", folder / "imagenet_synset_to_lemma.txt"
    if not (synsets.is_file() and lemmas.is_file()):
        return None
    names = dict(line.split("\t", 1) for line in lemmas.read_text(encoding="utf-8").splitlines())
    return tuple(names[synset] for synset in synsets.read_text(encoding="utf-8").split())


def published_labels(num_labels: int) -> dict[str, Any]:
    """Fields of a configuration for the labels of a published classifier: the names of ImageNet, if it has 1,000."""
    names = imagenet_names() if num_labels == 1000 else None
    if names is None:
        return {"num_labels": num_labels}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


class PublishedClassesMixin(VariantsMixin):
    """Gives a configuration class variants of which the published classifiers know their classes."""

    @classmethod
    def from_variant(cls, name: str, **overrides):
        """Build the configuration of a variant, see [`VariantsMixin.from_variant`]; a published one knows its classes."""
        num_labels = cls.variants.get(name, {}).get("num_labels")
        if num_labels is not None and not overrides.keys() & {"num_labels", "id2label", "label2id"}:
            overrides |= published_labels(num_labels)
        return super().from_variant(name, **overrides)


def image_processor_for(config: "PreTrainedConfig") -> "BitImageProcessor":
    """The image processor that the official evaluation of a model corresponds to.

    Bicubic resize of the shortest side and centre crop to `config.image_size`, or resize of both sides; normalisation.
    Save it with `save_pretrained` in the folder of the model, so that `AutoImageProcessor` and pipelines find it.

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
            f"{type(config).__name__} does not define how its images are prepared. Use the image processor saved with the "
            "model: `AutoImageProcessor.from_pretrained(...)`."
        )
    if not (is_torchvision_available() and is_vision_available()):
        raise ImportError("Image processors need torchvision and Pillow: `pip install 'hf_attn[vision]'`.")
    height, width = config.image_height_width
    image_size = {"height": height, "width": width}
    mean, std = config.channel_statistics()
    return BitImageProcessor(
        size=image_size if config.crop_ratio is None else {"shortest_edge": config.resized_edge},
        do_center_crop=config.crop_ratio is not None,
        crop_size=image_size,
        do_convert_rgb=config.num_channels == 3,
        resample=3,
        image_mean=mean,
        image_std=std,
    )
