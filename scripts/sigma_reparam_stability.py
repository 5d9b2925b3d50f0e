#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Effect of sigma-reparametrisation on the training of a deep transformer at a high learning rate (arXiv 2303.06296).

Trains BERT-type encoders, 12 layers deep, on the handwritten digits of scikit-learn as 16 tokens of 2 x 2 pixels, with Adam
at a constant learning rate, without warm-up, weight decay and gradient clipping. Each is trained as it is and
reparametrised, from the same initial function on the same batches. The encoders have LayerNorm after each residual sum
(`post_ln`) or none at all (`no_ln`).

    python scripts/sigma_reparam_stability.py --output_dir stability

About 11 minutes on one core. Prints a table, writes `results.json`, and draws the curves of loss and attention entropy at the
highest learning rate in `stability.png`. At the lower learning rate both forms train about equally well: what the
reparametrisation brings is the range of learning rates, and attention whose entropy does not collapse.
"""

import argparse
import json
import math
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from hf_attn.analysis.figures import new_figure
from hf_attn.examples.stability import ARCHITECTURES, NUM_CLASSES, Run, Setting, draw_runs, load_digits, train
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "sigma_reparam_stability.py"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def print_table(runs: list[Run]) -> None:
    """One line for each run: loss and accuracy at the end, mean entropy at the end, lowest of a layer at any time."""
    print(
        f"Uniform attention has an entropy of {math.log(16):.2f} nats, and guessing has a loss of {math.log(NUM_CLASSES):.2f}."
    )
    header = ("model", "lr", "seed", "", "loss", "accuracy", "entropy", "lowest")
    line = "{:>8} {:>6} {:>4}  {:<13} {:>8} {:>8} {:>8} {:>7}"
    print(line.format(*header))
    for run in runs:
        finite = [entropy for entropy in run.lowest_layer if math.isfinite(entropy)]
        numbers = (run.final_loss, run.accuracy, run.mean_entropy[-1], min(finite))
        print(
            line.format(
                run.architecture,
                f"{run.learning_rate:g}",
                run.seed,
                run.name,
                *(f"{number:.3f}" for number in numbers),
            )
        )


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the experiment; returns its runs."""
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--init", choices=["preserve", "unit"], default="preserve", help="As in apply_sigma_reparam.")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--depth", type=positive, default=12)
    parser.add_argument("--hidden_size", type=positive, default=64)
    parser.add_argument(
        "--entropy_every", type=positive, default=10, help="Steps between two measurements of the entropy."
    )
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Start a new run; an earlier run is kept under another name.",
    )
    options = parser.parse_args(arguments)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("output_dir", "overwrite_output_dir")
    }
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME, continues=False):
            return compare(options)
    except OutputFolderError as error:
        raise stop(NAME, error) from error


def compare(options: argparse.Namespace) -> list[Run]:
    """Train all models, and report."""
    try:
        data = load_digits()
    except ImportError as error:
        raise stop(NAME, error) from error
    setting = Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)})
    runs = [
        Run(architecture, reparametrised, learning_rate, seed)
        for architecture, learning_rate, seed, reparametrised in product(
            options.architectures, options.learning_rates, options.seeds, (False, True)
        )
    ]
    for run in tqdm(runs, desc="runs"):
        train(run, data, setting)
    print_table(runs)
    with written_whole(options.output_dir / "results.json") as part:
        part.write_text(json.dumps([asdict(run) for run in runs]), encoding="utf-8")
    highest = max(options.learning_rates)
    figure = new_figure(10, 3.2 * len(options.architectures))
    draw_runs([run for run in runs if run.learning_rate == highest], figure)
    figure.savefig(options.output_dir / "stability.png", dpi=150)
    return runs


if __name__ == "__main__":
    run_script(NAME, main)
