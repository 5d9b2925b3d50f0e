# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""EchoAtt against the model that it is made from, on SmolLM2-135M with the same attention implementation.

Measures, for each share of layers that reuse an attention map (those of the paper): decoding and prefill at several
context lengths, the time of a training step, parameters, and bytes of the KV cache. Ratios are base / student for
times, so above 1 the student is faster. `0%` is the family without shared layers, a check of what else differs.

    python scripts/benchmarks/echo_att.py --threads 2 --json echo_att.json
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import alternating_medians, print_table, write_json
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_attn.examples.assets import smollm2_folder
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM, evenly_shared_layers


RATIOS = (0.0, 0.23, 0.41, 0.77)


@torch.no_grad()
def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> DynamicCache:
    return model(tokens, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decoding(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """A function that decodes `new_tokens` after the context; the cache is cut back after each call."""
    cache = prefill(model, tokens)
    token = tokens[:, -1:]

    @torch.no_grad()
    def decode() -> None:
        for _ in range(new_tokens):
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-new_tokens)

    return decode


def training_step(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward and backward; the optimiser is not part of it."""

    def step() -> None:
        model.train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    return step


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    cache = prefill(model, torch.zeros(1, 8, dtype=torch.long))
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 8


def measure(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = next(iter(models.values())).config.vocab_size

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(0, vocab_size, (batch, length), generator=generator)

    tasks: dict[str, tuple[Callable[[PreTrainedModel], Callable[[], object]], int]] = {}
    for context in options.contexts:
        prompt = tokens(1, context)
        tasks[f"decode@{context}"] = (
            lambda model, prompt=prompt: decoding(model, prompt, options.new_tokens),
            options.repeats,
        )
        tasks[f"prefill@{context}"] = (
            lambda model, prompt=prompt: lambda: prefill(model, prompt),
            max(1, options.repeats // 2),
        )
    for batch, length in options.training:
        sequences = tokens(batch, length)
        tasks[f"train@{batch}x{length}"] = (
            lambda model, sequences=sequences: training_step(model, sequences),
            max(1, options.repeats // 2),
        )

    rows = []
    for task, (prepare, repeats) in tasks.items():
        start = time.perf_counter()
        callables = {name: prepare(model) for name, model in models.items()}
        seconds = alternating_medians(callables, repeats)
        row = {"task": task}
        for name, value in seconds.items():
            row[f"{name} s"] = value / (options.new_tokens if task.startswith("decode") else 1)
        for name in list(seconds)[1:]:
            row[f"x {name}"] = seconds["base"] / seconds[name]
        rows.append(row)
        print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn_implementation", default="sdpa", choices=["eager", "sdpa"])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 4096])
    parser.add_argument(
        "--training", type=lambda text: tuple(map(int, text.split("x"))), nargs="*", default=[(4, 128), (1, 512)]
    )
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), attn_implementation=options.attn_implementation)
    num_layers = base.config.num_hidden_layers
    models = {"base": base}
    for ratio in options.ratios:
        layers = evenly_shared_layers(num_layers, round(ratio * num_layers))
        models[f"{ratio:.0%}"] = EchoAttForCausalLM.from_base(base, shared_layers=layers)

    sizes = []
    for name, model in models.items():
        parameters, cached = model.num_parameters(), cache_bytes_per_token(model)
        sizes.append(
            {
                "model": name,
                "parameters": parameters,
                "parameters %": 100 * (parameters / base.num_parameters() - 1),
                "cache bytes/token": cached,
                "cache %": 100 * (cached / sizes[0]["cache bytes/token"] - 1) if sizes else 0.0,
            }
        )
    print_table(sizes)
    rows = measure(models, options)
    print_table(rows)
    settings = {
        "attn_implementation": options.attn_implementation,
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    write_json(options.json, {**settings, "sizes": sizes, "times": rows})


if __name__ == "__main__":
    main()
