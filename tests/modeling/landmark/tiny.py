"""Small landmark models for the tests."""

import torch
from transformers import MistralConfig, MistralForCausalLM, set_seed

from hf_attn.modeling.landmark.insertion import Insertion
from hf_attn.modeling.landmark.modeling_landmark import LandmarkForCausalLM
from tests.batteries import bases


FREQ, BLOCK = 4, 5
SIZES = {**bases.SIZES, "num_hidden_layers": 2, "max_position_embeddings": 256}
VOCAB = SIZES["vocab_size"]
BASES = {
    **bases.BASES,
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
}


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def make_base(name: str = "llama", **overrides):
    return bases.base_model(*BASES[name], **{**SIZES, **overrides})


def make_model(name: str = "llama", **overrides) -> LandmarkForCausalLM:
    overrides = {"mem_freq": FREQ, "train_context_length": 40, **overrides}
    model = LandmarkForCausalLM.from_base(make_base(name), **overrides)
    # The mean of random rows is close to zero, so all landmarks would be nearly equal.
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
