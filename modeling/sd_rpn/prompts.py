"""Prompts and images as users give them, made into the inputs of a base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_utils import load_image


if TYPE_CHECKING:
    from PIL.Image import Image


#: a question, a text with image placeholders, or the messages of a chat
PromptLike = str | Sequence[Mapping[str, Any]]
#: an image, or none, or several, of a prompt; an image is a Pillow image, a path, a URL or base64
ImagesLike = Any


@dataclass(frozen=True)
class Prompt:
    """A prompt as text with image placeholders, and its images, upright and in RGB."""

    text: str
    images: list["Image"]


def is_chat(prompt: Any) -> bool:
    """Whether something is the messages of one chat."""
    is_list = isinstance(prompt, list | tuple) and len(prompt) > 0
    return is_list and isinstance(prompt[0], Mapping) and "role" in prompt[0]


def read_prompt(processor: ProcessorMixin, prompt: PromptLike, images: ImagesLike = None) -> Prompt:
    """Render a prompt and load its images.

    Args:
        processor: of the base.
        prompt: messages of a chat, in transformers' form, whose images may also be `image_url` entries as in other
            libraries; a text that contains the processor's image placeholder, which is
            taken as it is; or a plain question, which becomes a user's message.
        images: the images, in the order of their placeholders. Those of a chat can stand in its messages instead.

    Raises:
        ValueError: if images and placeholders differ in number, or if a chat template is needed and there is none.
    """
    images = _as_list(images)
    if isinstance(prompt, str) and processor.image_token not in prompt and (images or processor.chat_template):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    if not isinstance(prompt, str):
        prompt, images = _render(processor, prompt, images)
    placeholders = prompt.count(processor.image_token)
    if placeholders != len(images):
        raise ValueError(
            f"The prompt has {placeholders} image placeholders ({processor.image_token}) for {len(images)} images. A "
            "prompt needs one per image; in a chat, this is an entry of type 'image'."
        )
    return Prompt(prompt, [load_image(_as_source(image)) for image in images])


def _as_list(images: ImagesLike) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _as_source(image):
    from pathlib import Path

    return str(image) if isinstance(image, Path) else image


def _render(processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]], images: list) -> tuple[str, list]:
    if processor.chat_template is None:
        raise ValueError(
            "The processor has no chat template. Pass the prompt in the format of the base, with "
            f"{processor.image_token} in the place of each image, or set processor.chat_template."
        )
    messages = [_with_images(message) for message in messages]
    entries = [
        entry
        for message in messages
        if not isinstance(message["content"], str)
        for entry in message["content"]
        if entry.get("type") == "image"
    ]
    sources = [
        next((entry[key] for key in ("image", "url", "path", "base64") if entry.get(key) is not None), None)
        for entry in entries
    ]
    inside = [source for source in sources if source is not None]
    if inside and images:
        raise ValueError("Pass the images of a chat either in its messages or as `images`, not both.")
    continues = messages[-1]["role"] == "assistant"
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )
    return text, inside or images


def _with_images(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with `image` entries, which chat templates support, instead of `image_url` entries."""
    if isinstance(message["content"], str):
        return message
    content = []
    for entry in message["content"]:
        if entry.get("type") == "image_url":
            url = entry["image_url"]
            entry = {"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}
        content.append(entry)
    return {**message, "content": content}


def encode_prompts(processor: ProcessorMixin, config: PreTrainedConfig, prompts: Sequence[Prompt]) -> dict:
    """Inputs of a base for prompts, padded on the left.

    Images for LLaVA-1.5 are padded to squares with the mean colour first, as in its training and in all that SD-RPN computes
    boxes for; the image processor of the Hub's checkpoints would cut off their sides.

    Returns:
        Output of the processor for the batch.
    """
    rows = [_encode_prompt(processor, config, prompt) for prompt in prompts]
    length = max(row["input_ids"].shape[1] for row in rows)
    pad_token_id = pad_token(processor.tokenizer)
    inputs = {}
    for name, fill in (("input_ids", pad_token_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if name in rows[0]:
            tensors = [row[name] for row in rows]
            padded = [torch.nn.functional.pad(ids, (length - ids.shape[1], 0), value=fill) for ids in tensors]
            inputs[name] = torch.cat(padded)
    for name in ("pixel_values", "image_sizes", "image_grid_thw"):
        tensors = [row[name] for row in rows if name in row]
        if tensors:
            inputs[name] = _concatenated(tensors)
    return inputs


def _encode_prompt(processor: ProcessorMixin, config: PreTrainedConfig, prompt: Prompt) -> dict:
    images = prompt.images
    if config.model_type == "llava":
        colour = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
        images = [pad_to_square(image, colour) for image in images]
    bos = processor.tokenizer.bos_token
    has_bos = bos is not None and prompt.text.startswith(bos)
    options = {"add_special_tokens": False} if has_bos else {}
    return processor(text=[prompt.text], images=images or None, return_tensors="pt", **options)


def pad_to_square(image: "Image", colour: tuple[int, int, int]) -> "Image":
    """Centre an image in a square of its longer side."""
    from PIL import Image

    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension; LLaVA-Next's tiles, along the second, are filled up with zeros."""
    if tensors[0].ndim == 5:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [torch.nn.functional.pad(t, (0, 0) * 3 + (0, most - t.shape[1])) for t in tensors]
    return torch.cat(tensors)


def pad_token(tokenizer) -> int:
    """Id of the padding of shorter prompts, which is masked."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
