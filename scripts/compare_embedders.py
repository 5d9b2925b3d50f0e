#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train the five designs under one budget, and compare them as the paper does.

    python scripts/compare_embedders.py --output_dir comparison

takes about twelve minutes on one core: three seeds of each design, a few steps, and the lowest layers of SmolLM2-135M only. What follows
`--` are arguments of `run_embedding.py` in the place of these (`BUDGET`), the same for all designs:

    python scripts/compare_embedders.py --output_dir comparison --seeds 0 1 2 3 4 -- --max_steps 200

A score is the mean reciprocal rank of a held-out task,
averaged over the seeds; with `--dataset_name` the tasks are those that its column `task` names. Pairs of designs are compared by
Wilcoxon's signed-rank test over the tasks, with and without Holm's correction. Runs that are done are not repeated.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from hf_attn.analysis.figures import new_figure
from hf_attn.analysis.paired_tests import PairedTest, paired_tests
from hf_attn.training import arguments as command_line
from hf_attn.training.output_folder import OutputFolderError, output_folder


NAME = "compare_embedders.py"
SIGNIFICANT = 0.05
#: arguments of `run_embedding.py` if none are given
BUDGET = ("--num_hidden_layers", "6", "--num_latents", "8", "--max_steps", "20")


def scores_of(folder: Path, arguments: list[str], design: int, seed: int) -> dict[str, float]:
    """Mean reciprocal rank of each task after a run, which is made unless it has been."""
    import run_embedding  # the script in the same folder

    results = folder / "task_results.json"
    if not results.is_file():
        if folder.exists():
            shutil.rmtree(folder)  # a run that was stopped
        own = ["--design", str(design), "--seed", str(seed), "--output_dir", str(folder), "--save_strategy", "no"]
        run_embedding.main([*arguments, *own])
    return {task: scores["mrr"] for task, scores in json.loads(results.read_text(encoding="utf-8")).items()}


def plot(scores: dict[str, list[float]], path: Path) -> None:
    """Scores of the tasks, a column a design, and their mean."""
    figure = new_figure(1.2 + 0.9 * len(scores), 3.2)
    axes = figure.add_subplot(ylabel="mean reciprocal rank")
    for column, values in enumerate(scores.values()):
        axes.plot([column] * len(values), values, "o", color="tab:blue", alpha=0.5)
        axes.plot([column - 0.3, column + 0.3], [mean(values)] * 2, color="black")
    axes.set_xticks(range(len(scores)), list(scores))
    figure.savefig(path)


def print_results(scores: dict[str, list[float]], tests: list[PairedTest]) -> None:
    """Two tables: the means, and the pairs."""
    print("design      mean mrr")
    for name, values in scores.items():
        print(f"{name:10}  {mean(values):8.4f}")
    print("\npair                     difference         p    Holm p")
    for test in tests:
        mark = " *" if test.holm_p < SIGNIFICANT else ""
        pair = f"{test.first} - {test.second}"
        print(f"{pair:23}  {test.difference:10.4f}  {test.p:8.4f}  {test.holm_p:8.4f}{mark}")


def main(arguments: list[str] | None = None) -> dict:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, shared = arguments, list(BUDGET)
    if "--" in arguments:
        cut = arguments.index("--")
        own, shared = arguments[:cut], arguments[cut + 1 :]
    parser = command_line.Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--designs", type=int, nargs="+", default=[1, 2, 3, 4, 5], choices=range(1, 6))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Start a new run; an earlier run in output_dir is kept under another name.",
    )
    options = parser.parse_args(own)
    if len(set(options.designs)) < 2:
        parser.error("--designs needs at least two designs")
    settings = {"arguments": shared, "seeds": options.seeds}
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME):
            return compare(options, shared)
    except OutputFolderError as error:
        raise command_line.stop(NAME, error) from error


def compare(options: argparse.Namespace, shared: list[str]) -> dict:
    """Run the designs, and test the differences of their scores."""
    scores = {}
    for design in dict.fromkeys(options.designs):
        runs = [
            scores_of(options.output_dir / f"design{design}-seed{seed}", shared, design, seed)
            for seed in options.seeds
        ]
        scores[f"design {design}"] = [mean(run[task] for run in runs) for task in runs[0]]
    tests = paired_tests(scores)
    print_results(scores, tests)
    result = {"tasks": list(runs[0]), "scores": scores, "tests": [asdict(test) for test in tests]}
    (options.output_dir / "comparison.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(scores, options.output_dir / "comparison.png")
    return result


if __name__ == "__main__":
    command_line.run_script(NAME, main)
