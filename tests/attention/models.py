"""Tiny models of transformers, to test `attn_implementation`."""

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

from tests.batteries.generation import spread_weights


VOCAB_SIZE = 61
DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**DECODER))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**DECODER, sliding_window=4))


def _bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertModel(config, add_pooling_layer=False)


def _vit() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=(12, 16),
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {"llama": _llama, "qwen2": _qwen2, "mistral": _mistral}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {"bert": _bert, "vit": _vit}


def make(kind: str, attn_implementation: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in eval mode, the same at every call, with weights large enough for attention to affect the output."""
    model = spread_weights((DECODERS | ENCODERS)[kind]()).eval().to(dtype)
    model.set_attn_implementation(attn_implementation)
    return model


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 16, generator=generator)}
    return {"input_ids": torch.randint(2, VOCAB_SIZE, (2, 9), generator=generator)}


def main_output(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state
