#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The byte-IMDb family of wide transformers, float32, one thread of a CPU: the deepest model against the widest.

    python scripts/benchmarks/wide_attention.py --json wide_attention.json

CPU time, all in turns, the least of several. The deepest model (4x4) and the widest (1x16) run with SDPA. The others are the widest model and
compute the same logits: with the class token's query alone, folded, and folded with a table of scores.
"""

import argparse
import time
from pathlib import Path

import torch
from _common import print_table, write_json

from hf_attn import WideTransformerConfig, WideTransformerForSequenceClassification


#: batch -> way -> how many times faster than the deepest model it has to be
TARGETS = {1: {"folded": 80.0, "folded, table": 45.0}, 32: {"folded": 43.0, "folded, table": 150.0}}


def make_models() -> dict[str, WideTransformerForSequenceClassification]:
    """Models with random weights; those of the widest ones are shared."""
    models = {}
    for name, variant in (("deepest", "byte_imdb_4x4"), ("widest", "byte_imdb_1x16")):
        torch.manual_seed(0)
        models[name] = WideTransformerForSequenceClassification(WideTransformerConfig.from_variant(variant)).eval()
    for name, table in (("folded", False), ("folded, table", True)):
        folded = WideTransformerForSequenceClassification(models["widest"].config).eval()
        folded.load_state_dict(models["widest"].state_dict())
        models[name] = folded.fold(table=table)
    return models


def class_token_query(model: WideTransformerForSequenceClassification, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model of one layer that computes all keys and values, but only the query of the class token."""
    encoder, layer = model.model, model.model.layers[0]
    attention = layer.self_attn
    embeds = encoder.cls_token(encoder.embed_tokens(input_ids))
    states = encoder.embed_positions(embeds, torch.arange(embeds.shape[1])[None])
    normed = layer.input_layernorm(states)
    query = attention.heads(attention.q_proj, normed[:, :1])
    key, value = attention.heads(attention.k_proj, normed), attention.heads(attention.v_proj, normed)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    state = states[:, :1] + attention.o_proj(mixed)
    state = state + layer.mlp(layer.post_attention_layernorm(state))
    return model.classifier(encoder.norm(state)[:, 0])


def cpu_seconds(callables: dict, repeats: int) -> dict[str, float]:
    """Least CPU seconds of each, in turns; the quick ones run several times in a turn."""
    for function in callables.values():
        function()
    seconds = {name: [] for name in callables}
    for _ in range(repeats):
        for name, function in callables.items():
            for _ in range(5 if name.startswith("folded") else 1):
                start = time.thread_time()
                function()
                seconds[name].append(time.thread_time() - start)
    return {name: min(values) for name, values in seconds.items()}


@torch.no_grad()
def measure(models: dict, length: int, batch: int, repeats: int) -> list[dict]:
    ids = torch.randint(1, 257, (batch, length), generator=torch.Generator().manual_seed(0))
    calls = {name: (lambda model=model: model(ids).logits) for name, model in models.items()}
    calls["class token's query"] = lambda: class_token_query(models["widest"], ids)
    seconds = cpu_seconds(calls, repeats)
    expected = calls["widest"]()
    return [
        {
            "batch": batch,
            "length": length,
            "model": name,
            "ms": value * 1e3,
            "times faster": seconds["deepest"] / value,
            "at least": TARGETS.get(batch, {}).get(name),
            "parameters": models["widest" if name.startswith("class") else name].num_parameters(),
            "difference": None if name == "deepest" else (calls[name]() - expected).abs().max().item(),
        }
        for name, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=7, help="at batch size 1; a third of it for larger batches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, rows = make_models(), []
    for batch in arguments.batches:
        repeats = arguments.repeats if batch == 1 else max(1, arguments.repeats // 3)
        rows += measure(models, arguments.length, batch, repeats)
    print_table(rows)
    write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
