#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train a small landmark model and a plain Llama from random weights to recall facts, and ask them far beyond their training length (arXiv
2305.16300).

    python scripts/train_retrieval.py --output_dir retrieval

Texts state facts (a key and its value) among filler and end with questions. Both models have the same shape, texts, optimizer and steps;
texts of the training have up to 512 tokens. Prints the share of right answers by length, of the landmark model reading `--top_k` blocks
only, and what the wrong ones are: whether the block with the fact was not read, or was read and another value named. Writes
`results.json`, `results.png` and the trained models, which `from_pretrained` loads. A run that was interrupted is continued by the same command.
To look at trained models again, with other lengths or more blocks:

    python scripts/train_retrieval.py --output_dir retrieval --lengths 65536 --texts 4 --top_k 8
"""

import argparse
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev

from hf_attn.analysis.figures import new_figure
from hf_attn.examples.landmark_recall import MODELS, TOP_K, Settings, draw_recall, evaluate, load, train
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "train_retrieval.py"
LENGTHS = [512, 2048, 8192, 16384, 32768]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="lengths of the evaluated texts in tokens"
    )
    parser.add_argument("--texts", type=int, default=8, help="number of texts per length, with 8 questions each")
    parser.add_argument(
        "--top_k", type=int, default=TOP_K, help="number of blocks that the landmark model retrieves per query"
    )
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="start a new run; an earlier run is kept under another name",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, dict[int, list[dict]]]:
    """For each model and length, the evaluation of each seed."""
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    found = {name: {length: [] for length in options.lengths} for name in options.models}
    for seed in options.seeds:
        for name in options.models:
            model = load(name, train(name, settings, seed, options.output_dir / f"{name}-{seed}"))
            for length in options.lengths:
                result = evaluate(model, length, options.texts, options.top_k)
                print(f"{name}, seed {seed}, {length:,} tokens: {result['right']:.0%}", flush=True)
                found[name][length].append(result)
    return found


def report(found: dict[str, dict[int, list[dict]]]) -> None:
    for name, lengths in found.items():
        print(f"\n{name}: correct answers by length, and kinds of answers")
        for length, results in lengths.items():
            shares = [result["right"] for result in results]
            spread = f" ± {stdev(shares):.1%}" if len(shares) > 1 else ""
            outcomes = sum((Counter(result["outcomes"]) for result in results), Counter())
            told = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
            print(f"{length:>7} {fmean(shares):>6.1%}{spread}   {told}")


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    settings = {field.name: getattr(options, field.name) for field in fields(Settings)}
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME):
            found = run(options)
            report(found)
            with written_whole(options.output_dir / "results.json") as part:
                part.write_text(
                    json.dumps({"top_k": options.top_k, "models": found}, indent=1) + "\n", encoding="utf-8"
                )
            figure = new_figure(6.4, 3.6)
            draw_recall(found, figure.add_subplot())
            figure.savefig(options.output_dir / "results.png", dpi=100)
            print(f"\nWritten to {options.output_dir}")
    except OutputFolderError as error:
        raise stop(NAME, error) from error


if __name__ == "__main__":
    run_script(NAME, main)
