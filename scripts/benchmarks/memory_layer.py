# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""MemoryLayer against nn.Linear of the same width.

Ratios are linear / memory for times, so above 1 the memory layer is faster. `few` runs a stack of layers whose weights do not
fit the cache of the processor, on fresh inputs: `alone` hashes for each layer, `qkv` once for three. `many` runs one layer on
many tokens, forward, and with backward with dense and with sparse gradients of the tables; `plain gather` is the time of the sum
as it is written.

    python scripts/benchmarks/memory_layer.py --json memory_layer.json
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, write_json
from torch import nn

from hf_attn.architectures.memory_layer import MemoryLayer
from hf_attn.kernels.memory import plain_lookup


#: weights of a stack of linear layers; more than the caches of usual processors hold
STACK_BYTES = 64 * 2**20


def fresh(function: Callable[[torch.Tensor], object], *shape: int, dtype: torch.dtype) -> Callable[[], object]:
    """A function of an input that is another one in every call."""
    inputs = iter([torch.randn(shape).to(dtype) for _ in range(16)] * 1000)
    return lambda: function(next(inputs))


@torch.no_grad()
def stack(layer_class: type[nn.Module], width: int, dtype: torch.dtype) -> list[nn.Module]:
    """Layers without initialisation, which would take longer than everything else; the time does not depend on the values."""
    count = max(3, STACK_BYTES // (width * width * dtype.itemsize) // 3 * 3)
    layers = [layer_class(width, width, dtype=dtype, device="meta").to_empty(device="cpu") for _ in range(count)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.fill_(0.01)
    return layers


@torch.no_grad()
def few_tokens(
    linears: list[nn.Module], memories: list[nn.Module], width: int, tokens: int, dtype: torch.dtype, repeats: int
) -> dict:
    count = len(linears)
    triples = [memories[index : index + 3] for index in range(0, count, 3)]

    def in_turn(layers: Sequence[nn.Module]) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def run(states: torch.Tensor) -> None:
            for layer in layers:
                layer(states)
                states = states.roll(1, -1)  # other rows in every layer

        return run

    @torch.no_grad()
    def with_one_hash(states: torch.Tensor) -> None:
        for query, key, value in triples:
            hashed = query.hash(states)
            for layer in (query, key, value):
                layer.fetch(*hashed)
            states = states.roll(1, -1)

    runs = {"linear": in_turn(linears), "alone": in_turn(memories), "qkv": with_one_hash}
    seconds = alternating_medians(
        {name: fresh(run, tokens, width, dtype=dtype) for name, run in runs.items()}, repeats, warmup=2
    )
    return {
        "width": width,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "linear us": seconds["linear"] / count * 1e6,
        "x alone": seconds["linear"] / seconds["alone"],
        "x qkv": seconds["linear"] / seconds["qkv"],
    }


def many_tokens(width: int, tokens: int, dtype: torch.dtype, repeats: int) -> dict:
    linear = nn.Linear(width, width, dtype=dtype)
    memory = MemoryLayer(width, width, dtype=dtype)
    sparse = MemoryLayer(width, width, dtype=dtype, sparse_gradients=True)
    upstream = torch.randn(tokens, width).to(dtype)

    def forward(layer: nn.Module) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def run(states: torch.Tensor) -> None:
            layer(states)

        return run

    def both(layer: nn.Module) -> Callable[[torch.Tensor], None]:
        def run(states: torch.Tensor) -> None:
            layer.zero_grad(set_to_none=True)
            layer(states.requires_grad_()).backward(upstream)

        return run

    @torch.no_grad()
    def plain(states: torch.Tensor) -> None:
        plain_lookup(*memory.hash(states), memory.tables)

    runs = {
        "linear": forward(linear),
        "memory": forward(memory),
        "plain": plain,
        "linear backward": both(linear),
        "memory backward": both(memory),
        "sparse backward": both(sparse),
    }
    runs = {name: fresh(run, tokens, width, dtype=dtype) for name, run in runs.items()}
    seconds = alternating_medians(runs, repeats)
    return {
        "width": width,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "linear ms": seconds["linear"] * 1e3,
        "x forward": seconds["linear"] / seconds["memory"],
        "x with backward": seconds["linear backward"] / seconds["memory backward"],
        "x with sparse backward": seconds["linear backward"] / seconds["sparse backward"],
        "plain gather / memory": seconds["plain"] / seconds["memory"],
        "peak MB": peak_memory(runs["memory"]) / 2**20,
        "plain gather MB": peak_memory(runs["plain"]) / 2**20,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[512, 768, 1024])
    parser.add_argument("--few", type=int, nargs="*", default=[1, 4, 32])
    parser.add_argument("--many", type=int, nargs="*", default=[2048])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    result = {"threads": options.threads, "few": [], "many": []}
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for width in options.widths:
            if options.few:
                stacks = stack(nn.Linear, width, dtype), stack(MemoryLayer, width, dtype)
                result["few"] += [few_tokens(*stacks, width, tokens, dtype, options.repeats) for tokens in options.few]
                del stacks
            result["many"] += [many_tokens(width, tokens, dtype, options.repeats) for tokens in options.many]
            write_json(options.json, result)
            print(f"{dtype}, width {width}: done", flush=True)
    for rows in (result["few"], result["many"]):
        if rows:
            print_table(rows)
            print()


if __name__ == "__main__":
    main()
