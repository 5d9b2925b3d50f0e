# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Landmark retrieval against full attention (sdpa, transformers' `DynamicCache`) on the weights of SmolLM2-135M.

    python scripts/benchmarks/landmark.py --json landmark.json

Batch 1, float32. `decode`: seconds per token after a context, whose keys and values are random numbers: what is in them does
not change the time. The landmark model decodes a whole block, so that the step which adds a landmark has its share; the
models take turns. The slope is the growth between the shortest context beyond 4096 tokens (or 4096) and the longest.
`prefill`: seconds for a prompt, once, each in a fresh process. `memory`: the most that a fresh process holds beyond the
model while the cache is filled, in the pieces in which a prompt is, and 4 tokens are decoded, in MiB; `working` is what of
it is not the stored keys and values, and `offloaded` a landmark cache with `offload_to_cpu`, whose working set is the part
that would be on a GPU (its landmark keys, which would be there too, are counted as part of the working set).
One row again:

    python scripts/benchmarks/landmark.py --tasks decode --contexts 4096 32768 --threads 1
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, run_fresh, write_json
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from hf_attn.examples.assets import smollm2_folder
from hf_attn.modeling.landmark.cache import Destination
from hf_attn.modeling.landmark.insertion import Insertion
from hf_attn.modeling.landmark.modeling_landmark import LandmarkCache, LandmarkForCausalLM


FULL, LANDMARK, OFFLOADED = "full", "landmark", "offloaded"
TASKS = ("decode", "prefill", "memory")
MIB = 2**20
#: slopes are taken from here on
SLOPE_FROM = 4096


def load_model(system: str, options: argparse.Namespace) -> PreTrainedModel:
    if system == FULL:
        return AutoModelForCausalLM.from_pretrained(smollm2_folder(), attn_implementation="sdpa")
    return LandmarkForCausalLM.from_base(smollm2_folder(), mem_freq=options.mem_freq)


def make_cache(system: str, model: PreTrainedModel, options: argparse.Namespace) -> Cache:
    if system == FULL:
        return DynamicCache(config=model.config)
    return LandmarkCache(model.config, top_k=options.top_k, offload_to_cpu=system == OFFLOADED)


@torch.no_grad()
def filled_cache(system: str, model: PreTrainedModel, context: int, options: argparse.Namespace) -> Cache:
    """A cache of random keys and values, as after a prompt of `context` tokens."""
    config, cache = model.config, make_cache(system, model, options)

    def random_states(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        return torch.randn(shape), torch.randn(shape)

    if system == FULL:
        for index in range(config.num_hidden_layers):
            cache.update(*random_states(context), index)
        return cache
    insertion = Insertion.of(torch.ones(1, context, dtype=torch.bool), config.mem_freq)
    length = insertion.valid.shape[1]
    cache.start(config, 1, model.device, inserts_landmarks=True)
    for piece in torch.arange(length).split(cache.max_chunk_length):
        destination = Destination.of(piece[None], int(piece[-1]) + 1, config.block_size)
        for layer in cache.layers:
            layer.update(*random_states(len(piece)), destination)
    cache.append_tokens(insertion.valid, insertion.is_landmark)
    cache.seen_tokens = context
    return cache


@torch.no_grad()
def decode(system: str, model: PreTrainedModel, cache: Cache, tokens: int) -> None:
    """Decode; the cache is cut back afterwards."""
    arguments = {} if system == FULL else {"insert_landmarks": True}
    token = torch.tensor([[7]])
    for _ in range(tokens):
        model(token, past_key_values=cache, use_cache=True, **arguments)
    cache.crop(-tokens)


@torch.no_grad()
def prefill(system: str, model: PreTrainedModel, context: int, options: argparse.Namespace) -> Cache:
    tokens = torch.randint(0, 49000, (1, context), generator=torch.Generator().manual_seed(0))
    arguments = {} if system == FULL else {"insert_landmarks": True}
    cache = make_cache(system, model, options)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    return cache


def stored_bytes(cache: Cache) -> int:
    """Bytes of the stored keys and values; slots that were never written take no memory on Linux."""
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if isinstance(cache, LandmarkCache):
        return allocated * int(cache.lengths.max()) // cache.layers[0].keys.shape[2]
    return allocated


def run_worker(options: argparse.Namespace) -> None:
    """Body of the fresh process: one system at one context."""
    system, task, context = options.worker, options.tasks[0], options.contexts[0]
    model = load_model(system, options)
    # Libraries allocate their own memory at the first call.
    prefill(system, model, 64, options)
    result = {}

    def work() -> None:
        start = time.perf_counter()
        if task == "prefill":
            cache = prefill(system, model, context, options)
        else:
            cache = filled_cache(system, model, context, options)
            decode(system, model, cache, 4)
        result.update(seconds=time.perf_counter() - start, stored=stored_bytes(cache))

    result["peak"] = peak_memory(work)
    print(json.dumps(result))


def in_fresh_processes(task: str, context: int, systems: tuple[str, ...], options: argparse.Namespace) -> dict:
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if task == "memory":
        # Freed memory is returned at once, which takes time, so that the peak does not include memory kept by the allocator.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    shared = ("--threads", options.threads, "--top_k", options.top_k, "--mem_freq", options.mem_freq)
    return {
        system: run_fresh(__file__, "--worker", system, "--tasks", task, "--contexts", context, *shared)
        for system in systems
    }


def measure_decode(options: argparse.Namespace) -> list[dict]:
    models = {system: load_model(system, options) for system in (FULL, LANDMARK)}
    tokens = {FULL: options.new_tokens, LANDMARK: options.mem_freq}
    rows = []
    for context in options.contexts:
        caches = {system: filled_cache(system, model, context, options) for system, model in models.items()}

        def decoding(system: str, caches: dict = caches) -> Callable[[], None]:
            return lambda: decode(system, models[system], caches[system], tokens[system])

        seconds = alternating_medians({system: decoding(system) for system in models}, options.repeats)
        each = {system: seconds[system] / tokens[system] for system in models}
        rows.append(
            {
                "context": context,
                "full ms": 1000 * each[FULL],
                "landmark ms": 1000 * each[LANDMARK],
                "full tokens/s": 1 / each[FULL],
                "landmark tokens/s": 1 / each[LANDMARK],
                "full / landmark": each[FULL] / each[LANDMARK],
            }
        )
        print(f"decode at {context}: {rows[-1]}", flush=True)
    return rows


def decode_slope(rows: list[dict]) -> float | None:
    """Growth of the landmark model's time beyond 4k as a share of full attention's."""
    beyond = [row for row in rows if row["context"] >= SLOPE_FROM]
    if len(beyond) < 2:
        return None
    growth = {name: beyond[-1][f"{name} ms"] - beyond[0][f"{name} ms"] for name in (FULL, LANDMARK)}
    return growth[LANDMARK] / growth[FULL]


def measure_prefill(options: argparse.Namespace) -> list[dict]:
    rows = []
    for context in options.contexts:
        results = in_fresh_processes("prefill", context, (FULL, LANDMARK), options)
        row = {"context": context}
        row |= {f"{system} s": result["seconds"] for system, result in results.items()}
        row["full / landmark"] = results[FULL]["seconds"] / results[LANDMARK]["seconds"]
        row |= {f"{system} peak MiB": result["peak"] / MIB for system, result in results.items()}
        rows.append(row)
        print(f"prefill of {context}: {row}", flush=True)
    return rows


def measure_memory(options: argparse.Namespace) -> list[dict]:
    rows = []
    for context in options.contexts:
        row = {"context": context}
        for system, result in in_fresh_processes("memory", context, (FULL, LANDMARK, OFFLOADED), options).items():
            row[f"{system} MiB"] = result["peak"] / MIB
            row[f"{system} working"] = (result["peak"] - result["stored"]) / MIB
        rows.append(row)
        print(f"memory at {context}: {row}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--top_k", type=int, default=4, help="blocks retrieved per token and head")
    parser.add_argument("--mem_freq", type=int, default=63, help="regular tokens per block")
    parser.add_argument("--new_tokens", type=int, default=8, help="tokens that full attention decodes per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--worker", choices=(FULL, LANDMARK, OFFLOADED), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker is not None:
        run_worker(options)
        return

    measures = {"decode": measure_decode, "prefill": measure_prefill, "memory": measure_memory}
    result = {"threads": options.threads, "top_k": options.top_k, "mem_freq": options.mem_freq}
    for task in options.tasks:
        result[task] = measures[task](options)
    for task in options.tasks:
        print(f"\n{task}, {options.threads} thread(s), {options.top_k} blocks of {options.mem_freq + 1}")
        print_table(result[task])
    if "decode" in result and (slope := decode_slope(result["decode"])) is not None:
        result["decode slope"] = slope
        print(f"Beyond 4k the landmark model's time grows by {slope:.1%} of full attention's growth.")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
