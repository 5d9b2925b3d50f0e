"""Datasets of pseudo-labels: their columns, and conversion of the official files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .plain_pickle import load_plain_pickle
from .rule import pseudo_labels


if TYPE_CHECKING:
    from datasets import Dataset, Features

#: columns of the official files that are used, and their types
_OFFICIAL = {"image": str, "prompt": str, "text": str, "sink_attn": np.ndarray, "grounding_attn_o2i": np.ndarray}


def label_features() -> "Features":
    """Columns of a dataset of pseudo-labels.

    `image`, `question`, `answer` (of the base model); `roi_labels`, rows of the grid with 1 for foreground, 0 for
    background and -100 for ignored cells; `grounding` and `sink`, the attention that they were made of.

    Raises:
        ImportError: if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets of pseudo-labels need the extra `train`: pip install 'hf_attn[train]'") from error

    def grid(dtype: str) -> datasets.List:
        return datasets.List(datasets.List(datasets.Value(dtype)))

    return datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "roi_labels": grid("int8"),
            "grounding": grid("float32"),
            "sink": grid("float32"),
        }
    )


def label_row(
    image: Any,
    question: str,
    answer: str,
    grounding: torch.Tensor,
    sink: torch.Tensor,
    image_size: tuple[int, int],
    *,
    rule: str,
    sink_threshold: float,
) -> dict[str, Any]:
    """One row of a dataset of pseudo-labels.

    Args:
        image: what `datasets.Image` takes.
        question, answer: the texts.
        grounding, sink: attention maps `(rows, columns)`.
        image_size: width and height of the image.
        rule, sink_threshold: see [`pseudo_labels`].
    """
    labels, _ = pseudo_labels(grounding[None], sink[None], [image_size], rule=rule, sink_threshold=sink_threshold)
    return {
        "image": image,
        "question": question,
        "answer": answer,
        "roi_labels": labels[0].to(torch.int8).numpy(),
        "grounding": grounding.float().numpy(),
        "sink": sink.float().numpy(),
    }


def official_labels(
    path: str | Path,
    image_folder: str | Path,
    *,
    rule: str = "llava",
    sink_threshold: float = 1e-3,
    max_samples: int | None = None,
) -> "Dataset":
    """Turn one of the official files of attention maps (`YuhengSSS/roi_pseudo` on the Hub) into a dataset.

    The files are pickles; they are read without running anything in them, see
    [`~hf_attn.modeling.sd_rpn.labels.plain_pickle.load_plain_pickle`].

    Args:
        path: the pickle.
        image_folder: folder that the paths of its images are relative to.
        rule: labelling rule of the base model, `llava` or `qwen`.
        sink_threshold: mean sink attention from which a cell is a sink; 1e-3 for LLaVA, 1e-2 for Qwen2.5-VL.
        max_samples: use the first so many maps of the file only.

    Returns:
        Dataset with the columns of [`label_features`].

    Raises:
        PlainPickleError: if the file holds anything but plain data.
        ValueError: if it is plain data, but not attention maps.
        FileNotFoundError: naming the first image that is not in the folder.
    """
    from datasets import Dataset

    features = label_features()
    path, image_folder = Path(path), Path(image_folder)
    records = load_plain_pickle(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path.name} does not contain a list of attention maps.")
    records = records[:max_samples]
    for i, record in enumerate(records):
        wrong = [
            name
            for name, kind in _OFFICIAL.items()
            if not isinstance(record, dict) or not isinstance(record.get(name), kind)
        ]
        if wrong:
            raise ValueError(f"Entry {i} of {path.name} is not an attention map: it lacks {', '.join(wrong)}.")
        if not (image_folder / record["image"]).is_file():
            raise FileNotFoundError(f"The image of entry {i}, {record['image']}, is not in {image_folder}.")

    def rows() -> Iterator[dict[str, Any]]:
        from PIL import Image

        for record in records:
            file = image_folder / record["image"]
            with Image.open(file) as image:
                size = image.size
            grounding, sink = (_grid(record[name]) for name in ("grounding_attn_o2i", "sink_attn"))
            yield label_row(
                str(file),
                record["prompt"],
                record["text"],
                grounding,
                sink,
                size,
                rule=rule,
                sink_threshold=sink_threshold,
            )

    return Dataset.from_list(list(rows()), features=features)


def _grid(attention: np.ndarray) -> torch.Tensor:
    """The map as a grid; those of LLaVA are stored as one row of a square."""
    if attention.ndim == 1:
        side = round(attention.size**0.5)
        if side * side != attention.size:
            raise ValueError(f"An attention map of {attention.size} cells is not square.")
        attention = attention.reshape(side, side)
    return torch.from_numpy(attention.astype(np.float64, copy=False))
