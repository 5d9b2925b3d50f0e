#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Fast attention of DeBERTa against transformers, base size, float32, one thread of a CPU.

    python scripts/benchmarks/deberta.py --json deberta.json

CPU time, both sides in turns, medians: one attention module at every length and batch size, then the whole model and a
training step at batch 1, and how far the outputs are apart. `--part memory` measures peaks, in processes of their own.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from _common import peak_memory, print_table, run_fresh, write_json
from transformers import DebertaV2Config, DebertaV2Model

from hf_attn import apply_fast_attention


#: (length, batch) -> how many times faster the attention module has to be
TARGETS = {(128, 1): 2.5, (128, 8): 2.5, (512, 1): 1.4, (512, 8): 1.4, (2048, 1): 2.5, (2048, 8): 2.5}
MEMORY_TARGET = 0.4


def make_models(num_layers: int) -> dict[str, DebertaV2Model]:
    """transformers' model of base size and the same one made fast; `hf_compat`, as texts are longer than the table."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    plain = DebertaV2Model(config).eval()
    fast = copy.deepcopy(plain)
    apply_fast_attention(fast, hf_compat=True)
    return {"transformers": plain, "fast": fast}


def cpu_seconds(callables: dict, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, in turns; other processes on the machine do not count."""
    for function in callables.values():
        function()
    seconds = {name: [] for name in callables}
    for _ in range(repeats):
        for name, function in callables.items():
            start = time.thread_time()
            function()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def attention_call(model: DebertaV2Model, length: int, batch: int):
    """A call of the first attention module as the encoder makes it; mask and distances are made before."""
    encoder, attention = model.encoder, model.encoder.layer[0].attention.self
    states = torch.randn(batch, length, 768, generator=torch.Generator().manual_seed(0))
    mask = encoder.get_attention_mask(torch.ones(batch, length))
    distances, table = encoder.get_rel_pos(states), encoder.get_rel_embedding().detach()
    return torch.no_grad()(lambda: attention(states, mask, relative_pos=distances, rel_embeddings=table)[0])


def measure_modules(repeats: int, cells) -> list[dict]:
    models, rows = make_models(1), []
    for length, batch in cells:
        calls = {name: attention_call(model, length, batch) for name, model in models.items()}
        seconds = cpu_seconds(calls, repeats if length * batch <= 4096 else 2)
        rows.append(_row("attention", length, batch, seconds, TARGETS[length, batch]))
        rows[-1]["difference"] = (calls["fast"]() - calls["transformers"]()).abs().max().item()
        print_table(rows[-1:])
    return rows


def measure_models(repeats: int, lengths, num_layers: int) -> list[dict]:
    models, rows = make_models(num_layers), []
    for length in lengths:
        ids = torch.randint(1, 1000, (1, length), generator=torch.Generator().manual_seed(0))
        infer = {name: torch.no_grad()(lambda model=model, ids=ids: model(ids)) for name, model in models.items()}
        rows.append(_row("model", length, 1, cpu_seconds(infer, repeats if length < 2048 else 1)))

        def step(model, ids=ids):
            model.train()
            model(ids).last_hidden_state.square().mean().backward()
            model.zero_grad()
            model.eval()

        train = {name: (lambda model=model: step(model)) for name, model in models.items()}
        rows.append(_row("training step", length, 1, cpu_seconds(train, repeats if length < 2048 else 1)))
        print_table(rows[-2:])
    return rows


def _row(what: str, length: int, batch: int, seconds: dict[str, float], target: float | None = None) -> dict:
    ratio = seconds["transformers"] / seconds["fast"]
    row = {"what": what, "length": length, "batch": batch}
    row |= {f"{name} ms": value * 1e3 for name, value in seconds.items()}
    return {**row, "ratio": ratio, "at least": target}


def measure_memory(length: int) -> dict:
    peaks = {
        name: run_fresh(__file__, "--peak-of", name, "--lengths", length)["peak"] for name in ("transformers", "fast")
    }
    ratio = peaks["fast"] / peaks["transformers"]
    return {
        "length": length,
        **{f"{k} MB": v / 2**20 for k, v in peaks.items()},
        "ratio": ratio,
        "at most": MEMORY_TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=("attention", "model", "memory"), nargs="*", default=["attention", "model", "memory"]
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12, help="number of layers of the whole model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", choices=("transformers", "fast"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of is not None:
        call = attention_call(make_models(1)[arguments.peak_of], arguments.lengths[0], 1)
        print(f'{{"peak": {peak_memory(call)}}}')
        return
    result = {}
    cells = [(length, batch) for length in arguments.lengths for batch in arguments.batches]
    if "attention" in arguments.part:
        result["attention"] = measure_modules(arguments.repeats, cells)
    if "model" in arguments.part:
        result["model"] = measure_models(arguments.repeats, arguments.lengths, arguments.layers)
    if "memory" in arguments.part:
        result["memory"] = measure_memory(max(arguments.lengths))
        print_table([result["memory"]])
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
