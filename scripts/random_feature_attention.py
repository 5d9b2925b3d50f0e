#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""How many samples random-feature attention needs, and a random-feature network (arXiv 2307.11353).

Fits random-feature attention (RFA), its biased form (BRFA) and a random-feature network with as many trained weights (RFMLP) to functions
of a query and a set of keys, by ridge regression with a penalty that is chosen on validation samples, and prints the test error
against the number of training samples: mean squared error over the variance of the target, mean and standard deviation over
seeds. Tokens are uniform on the unit sphere, labels have no noise.

    python scripts/random_feature_attention.py --output_dir rfa                  # d = N = 8, 200 heads, less than a minute
    python scripts/random_feature_attention.py --output_dir rfa_paper --size paper   # d = N = 16, 1000 heads, minutes a seed

Writes `errors.csv` (a line for each target, model, number of samples and seed) and `errors.png`. A run that was interrupted is continued by
the same command; finished seeds are kept.
"""

import argparse
import csv
from pathlib import Path

from tqdm.auto import tqdm

from hf_attn.analysis.figures import new_figure
from hf_attn.modeling.random_feature_attention.curves import (
    COLUMNS,
    MODELS,
    SIZES,
    TARGETS,
    draw_curves,
    run_seed,
    summarise,
)
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "random_feature_attention.py"


def read_errors(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row | {"samples": int(row["samples"]), "seed": int(row["seed"]), "error": float(row["error"])}
            for row in csv.DictReader(file)
        ]


def write_errors(path: Path, rows: list[dict[str, object]]) -> None:
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _order(curve: tuple[str, str]) -> tuple[int, int]:
    target, model = curve
    return list(TARGETS).index(target), MODELS.index(model)


def print_summary(summary: dict[tuple[str, str, int], tuple[float, float]]) -> None:
    samples = sorted({n for _, _, n in summary})
    print("".join([f"{'target':<14}{'model':<7}", *(f"{f'n={n}':>17}" for n in samples)]))
    for target, model in sorted({(target, model) for target, model, _ in summary}, key=_order):
        cells = [f"{mean:.4f} ± {spread:.4f}" for mean, spread in (summary[target, model, n] for n in samples)]
        print("".join([f"{target:<14}{model:<7}", *(f"{cell:>17}" for cell in cells)]))


def plot(summary: dict[tuple[str, str, int], tuple[float, float]], path: Path) -> None:
    """Draw the curves into a file."""
    targets = len({target for target, _, _ in summary})
    columns = min(4, targets)
    figure = new_figure(3.4 * columns, 2.9 * -(-targets // columns))
    draw_curves(summary, figure)
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--samples", type=int, nargs="+", help="numbers of training samples")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="start a new run; an earlier run is kept under another name",
    )
    options = parser.parse_args(arguments)
    options.samples = sorted(set(options.samples or SIZES[options.size][1]))
    if options.samples[0] < 2 or options.seeds < 1:
        parser.error("--samples must be at least 2 and --seeds at least 1")
    return options


def main(arguments: list[str] | None = None) -> dict[tuple[str, str, int], tuple[float, float]]:
    options = parse(arguments)
    settings = {"size": options.size, "samples": options.samples, "targets": options.targets}
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME):
            return run(options)
    except OutputFolderError as error:
        raise stop(NAME, error) from None


def run(options: argparse.Namespace) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Run the seeds that are missing; returns the summary of all."""
    path = options.output_dir / "errors.csv"
    rows = read_errors(path)
    finished = {row["seed"] for row in rows}
    for seed in tqdm([seed for seed in range(options.seeds) if seed not in finished], desc="seeds"):
        rows += run_seed(options.size, seed, options.samples, options.targets)
        write_errors(path, rows)
    summary = summarise(rows)
    print_summary(summary)
    plot(summary, options.output_dir / "errors.png")
    return summary


if __name__ == "__main__":
    run_script(NAME, main)
