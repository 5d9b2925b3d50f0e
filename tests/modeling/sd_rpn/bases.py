"""Tiny random base models and prompts with images for them."""

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


IMAGE_TOKEN = 3
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_llava(**text) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 16,
        },
        text_config={"model_type": "llama", **TEXT, **text},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config).eval()


def tiny_qwen(**text) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            **text,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def llava_inputs(text_lengths=((3, 4), (2, 2))) -> dict[str, torch.Tensor]:
    """Prompts of text, 16 image tokens and text, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.cat(
            [
                torch.randint(7, 40, (before,), generator=generator),
                torch.full((16,), IMAGE_TOKEN),
                torch.randint(7, 40, (after,), generator=generator),
            ]
        )
        for before, after in text_lengths
    ]
    length = max(map(len, rows))
    return {
        "input_ids": torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows]),
        "pixel_values": torch.randn(len(rows), 3, 16, 16, generator=generator),
    }


def qwen_inputs(grids=((4, 8), (8, 4)), text_lengths=((3, 4), (2, 2))) -> dict[str, torch.Tensor]:
    """As `llava_inputs`, with images of some numbers of patches; four patches make a token."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.cat(
            [
                torch.randint(7, 40, (before,), generator=generator),
                torch.tensor([5]),
                torch.full((height * width // 4,), IMAGE_TOKEN),
                torch.tensor([6]),
                torch.randint(7, 40, (after,), generator=generator),
            ]
        )
        for (height, width), (before, after) in zip(grids, text_lengths, strict=True)
    ]
    length = max(map(len, rows))
    input_ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows]),
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([(1, height, width) for height, width in grids]),
    }
