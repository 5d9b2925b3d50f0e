"""A task without downloads: tiny random LLaVA models, and images in which something is planted that a question names."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_attn.modeling.sd_rpn.labels.rule import BACKGROUND, FOREGROUND, IGNORED


if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


#: names and RGB values of the squares
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
QUESTION = "Where is the {colour} square ?"
#: of the tiny models. With transformers' 0.02, layers as narrow as these hardly mix their tokens, and what the network is
#: copied from starts as next to nothing.
INITIALIZER_RANGE = 0.15

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }} : {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


class PlantedSquares(Sequence):
    """Images of coloured squares on textured noise, each with a question that names one of them.

    Args:
        length: number of images.
        grid_size: cells in a row of the RoI map.
        seed: images of different seeds are different.
        squares: squares in an image, no two of the same colour.
    """

    def __init__(self, length: int, grid_size: int, seed: int, squares: int = 3):
        self.length, self.grid_size, self.seed, self.squares = length, grid_size, seed, squares

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        """`image`, `question`, `box` (left, top, right and bottom in pixels) and `roi_labels` `(grid_size, grid_size)`."""
        from PIL import Image

        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        width, height = rng.integers(150, 201, 2).tolist()
        pixels = _texture(rng, width, height)
        colours = rng.permutation(list(COLOURS))[: self.squares].tolist()
        boxes = _apart(rng, width, height, self.squares)
        for colour, (left, top, right, bottom) in zip(colours, boxes, strict=True):
            pixels[top:bottom, left:right] = COLOURS[colour]
        pixels += rng.normal(0, 8, pixels.shape)
        return {
            "image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)),
            "question": QUESTION.format(colour=colours[0]),
            "box": boxes[0],
            "roi_labels": box_labels(boxes[0], (width, height), self.grid_size),
        }


def box_labels(box: Sequence[float], image_size: tuple[int, int], grid_size: int) -> torch.Tensor:
    """RoI target of a box in an image that is centred in a square.

    Args:
        box: left, top, right and bottom in pixels, ends exclusive.
        image_size: width and height of the image.
        grid_size: cells in a row of the square.

    Returns:
        int64 `(grid_size, grid_size)`: cells that the box covers by half or more are foreground, cells that it does not
        touch are background, and what is between is ignored.
    """
    side = max(image_size)
    edges = torch.linspace(0, side, grid_size + 1)

    def covered(low: float, high: float, length: int) -> torch.Tensor:
        shift = (side - length) // 2
        overlap = edges[1:].clamp(max=high + shift) - edges[:-1].clamp(min=low + shift)
        return overlap.clamp(min=0) / (side / grid_size)

    left, top, right, bottom = box
    share = covered(top, bottom, image_size[1])[:, None] * covered(left, right, image_size[0])
    labels = torch.full((grid_size, grid_size), IGNORED)
    labels[share == 0] = BACKGROUND
    labels[share >= 0.5] = FOREGROUND
    return labels


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Grey-brown noise of two scales, `(height, width, 3)`."""
    coarse = rng.normal(0, 25, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)[:height, :width]
    return 120 + rng.normal(0, 15, 3) + coarse + rng.normal(0, 20, (height, width, 1))


def _apart(rng: np.random.Generator, width: int, height: int, count: int) -> list[tuple[int, int, int, int]]:
    """Squares with sides of a quarter to three eighths of the shorter side that do not touch each other."""
    while True:
        sides = (rng.uniform(0.25, 0.375, count) * min(width, height)).astype(int).tolist()
        corners = [(int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))) for side in sides]
        boxes = [(x, y, x + side, y + side) for (x, y), side in zip(corners, sides, strict=True)]
        if not any(_touch(a, b) for a, b in combinations(boxes, 2)):
            return boxes


def _touch(a: Sequence[int], b: Sequence[int]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def tiny_llava(
    grid_size: int = 12, hidden_size: int = 64, num_hidden_layers: int = 6, seed: int = 0
) -> tuple["LlavaForConditionalGeneration", "LlavaProcessor"]:
    """A random LLaVA whose tokenizer knows the words of the planted questions, and its processor, which pads to a square.

    Args:
        grid_size: image tokens in a row.
        hidden_size: width of the language model.
        num_hidden_layers: its number of layers.
        seed: seed of the weights; the global random state is not changed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "</s>", "<unk>", "<image>"]
    words = ["USER", "ASSISTANT", ":", *QUESTION.replace("{colour} ", "").split(), *COLOURS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(special + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    patch = 14
    size = patch * grid_size
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": size,
            "patch_size": patch,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": hidden_size,
            "initializer_range": INITIALIZER_RANGE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(vocabulary),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": None,
            "eos_token_id": vocabulary["</s>"],
            "pad_token_id": vocabulary["<pad>"],
        },
        image_token_id=vocabulary["<image>"],
        image_seq_length=grid_size**2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=True, size={"height": size, "width": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
    return model, processor
