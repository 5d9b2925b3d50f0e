# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""sigma-reparametrised linear layers against plain ones, on SmolLM2-135M.

Measures a training step (forward, backward, AdamW) with every linear map but the tied head reparametrised, and inference
with the layers folded. Ratios are reparametrised / plain, so 1.1 is an overhead of 10 %. What the layers add to a step
does not depend on the number of tokens: the overhead falls as batches grow.

    python scripts/benchmarks/sigma_reparam.py --threads 2 --json sigma_reparam.json
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from _common import alternating_medians, print_table, write_json
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_attn.examples.assets import smollm2_folder
from hf_attn.patching.sigma_reparam import apply_sigma_reparam, fold_sigma_reparam


def training_step(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], None]:
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        model(tokens, use_cache=False, logits_to_keep=1)

    return forward


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        type=lambda text: tuple(map(int, text.split("x"))),
        nargs="*",
        default=[(2, 128), (4, 128), (8, 128)],
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder())
    reparametrised = copy.deepcopy(plain)
    report = apply_sigma_reparam(reparametrised)
    print(f"{len(report.converted)} layers reparametrised", flush=True)

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, plain.config.vocab_size, shape, generator=generator) for shape in options.shapes]
    rows = []

    def measure(task: str, prepare: Callable[[PreTrainedModel, torch.Tensor], Callable[[], None]]) -> None:
        for tokens in batches:
            seconds = alternating_medians(
                {
                    "plain": prepare(plain, tokens),
                    "reparametrised": prepare(reparametrised, tokens),
                },
                options.repeats,
            )
            rows.append(
                {
                    "task": f"{task}@{'x'.join(map(str, tokens.shape))}",
                    **{f"{name} s": value for name, value in seconds.items()},
                    "ratio": seconds["reparametrised"] / seconds["plain"],
                }
            )
            print_table(rows[-1:])

    measure("train", training_step)
    fold_sigma_reparam(reparametrised)
    measure("folded inference", inference)
    print_table(rows)
    write_json(options.json, {"threads": options.threads, "repeats": options.repeats, "times": rows})


if __name__ == "__main__":
    main()
