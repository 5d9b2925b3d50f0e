"""Tiny decoders of transformers, as bases for families that are made by `from_base`."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
#: name -> model class, configuration class, fields of the configuration
BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_with_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


def base_model(
    model_class: type[PreTrainedModel], config_class: type, special: dict, **fields: object
) -> PreTrainedModel:
    """A model in eval mode whose norms and biases are not at their initial values."""
    set_seed(0)
    model = model_class(config_class(**{**SIZES, **special, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model
