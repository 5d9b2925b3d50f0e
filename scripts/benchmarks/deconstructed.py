# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Decoding with the mixers of deconstructed attention, against standard attention in a model of the same shape.

For each kind in all layers, and for a hybrid, decoded tokens per second, their ratio to the standard model's, and bytes of the
cache, at several lengths of context. The maps of constant sequences count as cache.

    python scripts/benchmarks/deconstructed.py --json deconstructed.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _common import alternating_medians, print_table, write_json
from transformers import DynamicCache, set_seed

from hf_attn.modeling.deconstructing_attention.configuration_deconstructing_attention import (
    LAYER_KINDS,
    DeconstructedConfig,
)
from hf_attn.modeling.deconstructing_attention.modeling_deconstructing_attention import DeconstructedForCausalLM


def make_model(
    placement: str | None, kind: str, context: int, options: argparse.Namespace
) -> DeconstructedForCausalLM:
    set_seed(0)
    length = context + 1024
    config = DeconstructedConfig(
        vocab_size=1024,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        max_position_embeddings=length,
        static_length=length,
        placement=placement,
        simple_kind="taylor_joint" if kind == "standard" else kind,
    )
    return DeconstructedForCausalLM(config).eval()


@torch.no_grad()
def decoding(
    model: DeconstructedForCausalLM, context: int, new_tokens: int
) -> tuple[Callable[[], None], DynamicCache]:
    """A function that decodes tokens after the context, each call after those of the last."""
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(0, 1024, (1, context), generator=torch.Generator().manual_seed(0))
    for part in tokens.split(4096, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(new_tokens):
            model(tokens[:, :1], past_key_values=cache)

    return decode, cache


def cache_bytes(cache: DynamicCache) -> int:
    total = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            total += layer.keys.nbytes + layer.values.nbytes
        total += sum(state.nbytes for state in getattr(layer, "states", {}).values())
        static_map = getattr(layer, "static_map", None)
        total += 0 if static_map is None else static_map.nbytes
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--kinds", nargs="*", default=list(LAYER_KINDS), choices=LAYER_KINDS)
    parser.add_argument(
        "--hybrid", default="non_approximate", choices=LAYER_KINDS[1:], help="kind of every second layer"
    )
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    rows = []
    for context in options.contexts:
        models = {"standard": (None, "standard")}
        models |= {kind: ("uniform", kind) for kind in options.kinds if kind != "standard"}
        models[f"hybrid {options.hybrid}"] = ("hybrid", options.hybrid)
        decoders, caches = {}, {}
        for name, (placement, kind) in models.items():
            decoders[name], caches[name] = decoding(
                make_model(placement, kind, context, options), context, options.new_tokens
            )
        cached = {name: cache_bytes(cache) for name, cache in caches.items()}
        seconds = alternating_medians(decoders, options.repeats)
        for name in models:
            rows.append(
                {
                    "context": context,
                    "layers": name,
                    "tokens/s": options.new_tokens / seconds[name],
                    "x standard": seconds["standard"] / seconds[name],
                    "cache bytes": cached[name],
                    "of standard": cached[name] / cached["standard"],
                }
            )
        print_table(rows[-len(models) :])
        print(flush=True)
    settings = {"width": options.width, "layers": options.layers, "threads": options.threads}
    write_json(options.json, {**settings, "rows": rows})


if __name__ == "__main__":
    main()
