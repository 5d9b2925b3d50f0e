"""Tiny LLaVA, LLaVA-Next and Qwen2.5-VL models with random weights, and their processors, created without files."""

from functools import cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel, SdRpnOutput
from hf_attn.modeling.sd_rpn.prompts import encode_prompts, read_prompt


BASES = ("llava", "llava_next", "qwen2_5_vl")
BRANCH, LAYERS = 2, 3
GRID = 6
IMAGE_SIZE = 14 * GRID
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the special tokens of all bases."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def token_id(token: str) -> int:
    return tokenizer().convert_tokens_to_ids(token)


def _text_fields() -> dict:
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }


def _llava_config(config_class, **fields):
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=14,
        projection_dim=16,
        initializer_range=0.3,
    )
    return config_class(
        vision_config=vision,
        text_config=LlamaConfig(**_text_fields()),
        image_token_index=token_id("<image>"),
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        **fields,
    )


def _qwen_config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            **_text_fields(),
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": 0.3,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


@cache
def tiny_base(kind: str) -> PreTrainedModel:
    """A base with random weights, in eval mode. It is shared, so tests must not change it."""
    torch.manual_seed(0)
    if kind == "llava":
        base = LlavaForConditionalGeneration(_llava_config(LlavaConfig))
    elif kind == "llava_next":
        pinpoints = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
        base = LlavaNextForConditionalGeneration(_llava_config(LlavaNextConfig, image_grid_pinpoints=pinpoints))
    else:
        base = Qwen2_5_VLForConditionalGeneration(_qwen_config())
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
    # Answers always have the requested length.
    base.generation_config.eos_token_id = None
    return base.eval()


def tiny_rpn(kind: str) -> SdRpnModel:
    """A network for `tiny_base(kind)` with its own random weights."""
    rpn = SdRpnModel.from_base(tiny_base(kind), branch_layer=BRANCH, num_hidden_layers=LAYERS)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in rpn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rpn


def tiny_processor(kind: str) -> ProcessorMixin:
    if kind == "qwen2_5_vl":
        template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        budget = {"min_pixels": 56 * 56, "max_pixels": 168 * 168}
        return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**budget), tokenizer(), Qwen2VLVideoProcessor(), template)
    options = {
        "tokenizer": tokenizer(),
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": _TEMPLATE.replace("IMAGE", "<image>"),
    }
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    if kind == "llava":
        return LlavaProcessor(CLIPImageProcessor(**size), **options)
    pinpoints = tiny_base(kind).config.image_grid_pinpoints
    return LlavaNextProcessor(LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints), **options)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def blob(grid: tuple[int, int], *boxes: tuple[int, int, int, int], value: float = 0.9) -> torch.Tensor:
    """A map of probabilities: `value` inside the boxes `(x0, y0, x1, y1)`, close to zero elsewhere."""
    roi_map = torch.full(grid, 1e-4)
    for x0, y0, x1, y1 in boxes:
        roi_map[y0:y1, x0:x1] = value
    return roi_map


def force_maps(rpn: SdRpnModel, *maps: torch.Tensor) -> None:
    """Let a network return these maps, one per image of a batch, for any input."""

    def forward(image_mask, query_positions=None, **inputs):
        logits = torch.full(image_mask.shape, -torch.inf)
        flat = torch.cat([roi_map.flatten() for roi_map in maps]).logit()
        for row, cells in enumerate(flat.split(image_mask.sum(dim=1).tolist())):
            logits[row, : len(cells)] = cells
        if query_positions is not None:
            logits = logits[:, None].expand(-1, query_positions.shape[1], -1)
        return SdRpnOutput(logits=logits)

    rpn.forward = forward


#: greedy, always to the same length
GREEDY = {"max_new_tokens": 6, "do_sample": False}


#: regions in maps of all grids that the images of these tests have: none, one, several
NONE, ONE, SEVERAL = (), ((2, 2, 4, 4),), ((0, 0, 2, 2), (3, 3, 6, 6))


def make_generator(kind: str, *regions) -> SdRpnGenerator:
    """A generator; with `regions`, one that finds these in square images, one entry per image."""
    rpn = tiny_rpn(kind)
    if regions:
        force_maps(rpn, *(blob((GRID, GRID), *boxes) for boxes in regions))
    return SdRpnGenerator(tiny_base(kind), rpn, tiny_processor(kind))


def square(seed: int = 0) -> Image.Image:
    """An image that all bases divide into GRID x GRID cells: Qwen2.5-VL has cells of 28 pixels."""
    return picture(28 * GRID, 28 * GRID, seed)


def tokens(generator: SdRpnGenerator, *arguments, threshold=0.4, **options) -> list[list[int]]:
    focused = generator.prepare(*arguments, threshold=threshold)
    sequences = generator.base.generate(**focused.model_inputs, **{**GREEDY, **options})
    return sequences[:, focused.model_inputs["input_ids"].shape[1] :].tolist()


def plain_tokens(kind: str, prompts: list, images: list, **options) -> list[list[int]]:
    """The answer of the base alone."""
    processor, base = tiny_processor(kind), tiny_base(kind)
    read = [read_prompt(processor, prompt, given) for prompt, given in zip(prompts, images, strict=True)]
    inputs = encode_prompts(processor, base.config, read)
    sequences = base.generate(**inputs, **{**GREEDY, **options})
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def prompt_length(kind: str, prompt: str, image: Image.Image) -> int:
    read = read_prompt(tiny_processor(kind), prompt, image)
    return encode_prompts(tiny_processor(kind), tiny_base(kind).config, [read])["input_ids"].shape[1]
