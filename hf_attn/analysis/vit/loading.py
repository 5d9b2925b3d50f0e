"""Vision transformers and images for an analysis, from folders, the Hub, scikit-learn and scikit-image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn


if TYPE_CHECKING:
    from PIL.Image import Image


#: model type of a checkpoint with several towers -> classes of its vision tower
_TOWERS = {
    "clip": ("CLIPVisionModel", "CLIPForImageClassification"),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification"),
}
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
#: photographs of scikit-image
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def load_vit(name: str) -> tuple[nn.Module, Any]:
    """Load a vision transformer and what prepares its images.

    Args:
        name: folder or Hub id of a model of transformers, or `timm/` and the name of a model of timm.

    Returns:
        The model in eval mode, with its classifier if it has one, and its image processor or transform.
    """
    if name.startswith("timm/") and not Path(name).exists():
        import timm

        model = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
        return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    classifies = any("ForImageClassification" in architecture for architecture in config.architectures or ())
    kind = config.model_type.removesuffix("_vision_model")
    if kind in _TOWERS:
        model_class = getattr(transformers, _TOWERS[kind][classifies])
    else:
        model_class = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    return model_class.from_pretrained(name).eval(), transformers.AutoImageProcessor.from_pretrained(name)


def read_images(folder: str | Path, limit: int, class_names: Sequence[str]) -> tuple[list["Image"], list[str] | None]:
    """Read the images of a folder, or of one folder for each class.

    Args:
        folder: contains images, or folders of images that are named after classes of the model.
        limit: largest number of images to read, taken evenly.
        class_names: classes of the model.

    Returns:
        The images, and their labels if they are in folders of classes.

    Raises:
        ValueError: if the folder has no images, one cannot be read, or a sub-folder is not named after a class of the model.
    """
    from PIL import Image

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f"{folder} contains no images ({', '.join(_SUFFIXES)}).")
    labels = None
    if all(path.parent.parent == folder for path in files) and class_names:
        labels = [path.parent.name for path in files]
        unknown = sorted({*labels} - {*class_names})
        if unknown:
            raise ValueError(
                f"{folder / unknown[0]} is not named after a class of the model. Rename the sub-folders, or put the "
                f"images into {folder} itself to analyse them without labels."
            )
    chosen = _evenly(len(files), limit)
    images = []
    for index in chosen:
        try:
            with Image.open(files[index]) as image:
                images.append(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{files[index]} cannot be read as an image: {error}.") from error

    return images, None if labels is None else [labels[index] for index in chosen]


def sample_images(class_names: Sequence[str], limit: int) -> tuple[list["Image"], list[str] | None]:
    """The digits of scikit-learn with their labels for a model of ten digits, else crops of scikit-image's photographs."""
    from PIL import Image

    if list(class_names) == [str(digit) for digit in range(10)]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = _evenly(len(digits.images), limit)
        images = [
            Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8)).convert("RGB") for index in chosen
        ]
        return images, [str(digits.target[index]) for index in chosen]
    import skimage.data

    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in _PHOTOGRAPHS]
    crops = list(photographs)
    for photograph in photographs:
        side = min(photograph.size) * 2 // 3
        width, height = photograph.size
        crops += [
            photograph.crop((left, top, left + side, top + side))
            for left in (0, width - side)
            for top in (0, height - side)
        ]
    return crops[:limit], None


def _evenly(count: int, limit: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist()
