"""Tiny decoders and batches for tests on several processes."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

import hf_attn  # noqa: F401


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind="llama", attention="sdpa", **more):
    """A decoder with random weights, the same in every process, in float32."""
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    else:
        config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[kind](**{**SIZES, **more})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def batch_of(rows=2, length=37, padding=0):
    """Token ids and labels; with padding the first row is shorter by that much, at its end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padding:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, -padding:] = 0
        batch["labels"][0, -padding:] = -100
    return batch


def packed_batch(lengths=(5, 1, 20, 14)):
    """Documents one after the other, with positions that restart."""
    batch = batch_of(1, sum(lengths))
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    batch["labels"][0, starts] = -100
    return batch
