#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The pooling head against the official form, and design 1 against a decoder with pooling by hand.

    python scripts/benchmarks/pooling_head.py --json pooling.json

CPU, float32, one thread. The official form projects the queries of the latents for every text of a batch, and every latent
by the last linear map; both forms have the same weights. Ratios are official / ours, minima of the CPU time of
alternating runs. The default sizes of the head are the official ones.
"""

import argparse
import time
from pathlib import Path

import torch
from _common import alternating_times, print_table, write_json
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from hf_attn import PoolingAttentionModel
from hf_attn.modeling.pooling_attention.head import PoolingHead


#: (width, keys) -> the ratio that is wanted
TARGETS = {(576, 128): 1.25, (896, 128): 1.4, (576, 24): 1.55, (896, 24): 1.55}


def official_form(head: PoolingHead, states: torch.Tensor) -> torch.Tensor:
    """The computation of the official code, text by text for the queries, with SDPA in the place of its softmax."""
    attention, latents = head.attention, head.latents.expand(len(states), -1, -1)
    query, states = attention.latents_norm(latents), attention.states_norm(states)
    query, key, value = (
        layer(inputs).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for layer, inputs in ((attention.query, query), (attention.key, states), (attention.value, states))
    )
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    pooled = attention.dense(attended) + latents
    return (pooled + head.feed_forward(pooled)).mean(dim=1)


@torch.no_grad()
def measure_head(width: int, keys: int, batch: int, sizes: tuple[int, int, int], repeats: int) -> dict:
    torch.manual_seed(0)
    head, states = PoolingHead(width, *sizes).eval(), torch.randn(batch, keys, width)
    calls = {"official": lambda: official_form(head, states), "ours": lambda: head(states)}
    difference = (calls["official"]() - calls["ours"]()).abs().max().item()
    seconds = {
        name: min(values) for name, values in alternating_times(calls, repeats, clock=time.process_time).items()
    }
    row = {"width": width, "keys": keys, "batch": batch, "latents x heads x width": "x".join(map(str, sizes))}
    row |= {f"{name} ms": value * 1e3 for name, value in seconds.items()}
    wanted = TARGETS.get((width, keys))
    return {**row, "ratio": seconds["official"] / seconds["ours"], "at least": wanted, "difference": difference}


@torch.no_grad()
def measure_design_1(batch: int, length: int, repeats: int) -> dict:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    base = LlamaModel(LlamaConfig(vocab_size=1000, num_hidden_layers=6, **sizes)).eval()
    model = PoolingAttentionModel.from_base(base, design=1)
    inputs = {"input_ids": torch.randint(0, 1000, (batch, length)), "attention_mask": torch.ones(batch, length)}
    inputs["attention_mask"][0, : length // 2] = 0

    def by_hand():
        return F.normalize(base(**inputs, use_cache=False).last_hidden_state[:, -1], dim=-1)

    calls = {"by hand": by_hand, "design 1": lambda: model(**inputs).pooler_output}
    difference = (calls["by hand"]() - calls["design 1"]()).abs().max().item()
    seconds = {
        name: min(values) for name, values in alternating_times(calls, repeats, clock=time.process_time).items()
    }
    row = {"batch": batch, "length": length} | {f"{name} ms": value * 1e3 for name, value in seconds.items()}
    return {**row, "time": seconds["design 1"] / seconds["by hand"], "at most": 1.05, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[576, 896])
    parser.add_argument("--keys", type=int, nargs="*", default=[24, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latents", type=int, default=768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.latents, arguments.heads, arguments.head_dim)
    heads = [
        measure_head(width, keys, arguments.batch, sizes, arguments.repeats)
        for width in arguments.widths
        for keys in arguments.keys
    ]
    print_table(heads)
    design_1 = measure_design_1(8, 128, arguments.repeats)
    print_table([design_1])
    write_json(arguments.json, {"head": heads, "design 1": design_1})


if __name__ == "__main__":
    main()
