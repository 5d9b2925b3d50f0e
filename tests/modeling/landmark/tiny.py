"""Small landmark models for the tests."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from hf_attn.modeling.landmark.insertion import Insertion
from hf_attn.modeling.landmark.modeling_landmark import (
    LandmarkForCausalLM,
)


VOCAB, FREQ, BLOCK = 40, 4, 5


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}


BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_with_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def make_base(name: str = "llama", **overrides):
    set_seed(0)
    model_class, config_class, special = BASES[name]
    model = model_class(config_class(**{**SIZES, **special, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def make_model(name: str = "llama", **overrides) -> LandmarkForCausalLM:
    overrides = {"mem_freq": FREQ, "train_context_length": 40, **overrides}
    model = LandmarkForCausalLM.from_base(make_base(name), **overrides)
    # The mean of random rows is almost nothing, and landmarks would all be alike.
    set_seed(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB].normal_()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def with_landmarks(ids: torch.Tensor) -> torch.Tensor:
    return Insertion.of(torch.ones_like(ids, dtype=torch.bool), FREQ).apply(ids, VOCAB)


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits
