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
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_attn import RandomFeatureAttentionConfig, RandomFeatureMLPConfig
from hf_attn.analysis.figures import new_figure
from hf_attn.modeling.random_feature_attention.modeling_random_feature_attention import (
    RandomFeatureAttentionModel,
    RandomFeatureMLPModel,
    RandomFeaturePreTrainedModel,
)
from hf_attn.modeling.random_feature_attention.ridge import gram_matrix, ridge_dual
from hf_attn.modeling.random_feature_attention.targets import sphere, target_function
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "random_feature_attention.py"
MODELS = ("RFA", "BRFA", "RFMLP")
TARGETS = {
    "key p=1": {"name": "key", "p": 1},
    "key p=2": {"name": "key", "p": 2},
    "key p=4": {"name": "key", "p": 4},
    "query p=1": {"name": "query", "p": 1},
    "query p=2": {"name": "query", "p": 2},
    "corr p=1 q=1": {"name": "corr", "p": 1, "q": 1},
    "corr p=3 q=1": {"name": "corr", "p": 3, "q": 1},
    "corr p=2 q=0": {"name": "corr", "p": 2, "q": 0},
}
#: variant of the configurations, numbers of training samples
SIZES = {"small": ("_small", (64, 256, 1024)), "paper": ("", (64, 128, 256, 512, 1024, 2048))}
#: `n lambda`, relative to the mean diagonal entry of the Gram matrix
PENALTIES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1e-1)
VALIDATION, TEST = 500, 1000
COLUMNS = ("target", "model", "samples", "seed", "error")


def make_models(size: str, seed: int) -> Iterator[tuple[str, RandomFeaturePreTrainedModel]]:
    suffix = SIZES[size][0]
    for name in MODELS:
        config_class = RandomFeatureMLPConfig if name == "RFMLP" else RandomFeatureAttentionConfig
        model_class = RandomFeatureMLPModel if name == "RFMLP" else RandomFeatureAttentionModel
        yield (
            name,
            model_class._from_config(config_class.from_variant(name.lower() + suffix, seed=seed, dtype="float64")),
        )


@torch.no_grad()
def run_seed(size: str, seed: int, samples: list[int], targets: list[str]) -> list[dict[str, object]]:
    """Errors of all models for all targets, with one draw of weights, inputs and directions."""
    config = RandomFeatureAttentionConfig.from_variant("rfa" + SIZES[size][0])
    generator = torch.Generator().manual_seed(10_000 + seed)
    largest = max(samples)
    x = sphere(largest + VALIDATION + TEST, config.num_keys + 1, config.input_dim, generator=generator)
    beta = sphere(config.input_dim, generator=generator)
    y = torch.stack([target_function(x, beta, **TARGETS[target]) for target in targets], 1)
    validation, test = slice(largest, largest + VALIDATION), slice(largest + VALIDATION, None)

    rows = []
    for name, model in make_models(size, seed):
        features = model.features(x)
        # None of these depends on the target, nor, but for their number, on the samples.
        gram = gram_matrix(features[:largest])
        others = features[largest:] @ features[:largest].T
        for n in samples:
            scale = gram[:n, :n].diagonal().mean().item() / n
            predictions = []
            for penalty in PENALTIES:
                coefficients = ridge_dual(gram[:n, :n], y[:n], penalty * scale)
                predictions.append(others[:, :n] @ coefficients)
            predictions = torch.stack(predictions)
            errors = (predictions[:, :VALIDATION] - y[validation]).square().mean(1)
            best = predictions[errors.argmin(0), :, torch.arange(len(targets))].T
            error = (best[VALIDATION:] - y[test]).square().mean(0) / y[test].var(0, correction=0)
            rows += [
                dict(zip(COLUMNS, (target, name, n, seed, value), strict=True))
                for target, value in zip(targets, error.tolist(), strict=True)
            ]
    return rows


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


def summarise(rows: list[dict[str, object]]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """(target, model, samples) -> mean and standard deviation of the error over seeds."""
    errors: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        errors.setdefault((row["target"], row["model"], row["samples"]), []).append(row["error"])
    return {key: (statistics.fmean(values), statistics.pstdev(values)) for key, values in errors.items()}


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
    """One panel a target, both axes logarithmic, one curve a model with its spread."""
    targets = list(dict.fromkeys(target for target, _, _ in summary))
    columns = min(4, len(targets))
    rows = -(-len(targets) // columns)
    figure = new_figure(3.4 * columns, 2.9 * rows)
    for index, target in enumerate(targets):
        axes = figure.add_subplot(rows, columns, index + 1)
        for model, marker in zip(MODELS, "os^", strict=True):
            points = sorted(
                (n, *value) for (name, kind, n), value in summary.items() if (name, kind) == (target, model)
            )
            n, mean, spread = zip(*points, strict=True)
            axes.plot(n, mean, marker=marker, label=model)
            low = [max(m - s, m / 10) for m, s in zip(mean, spread, strict=True)]
            axes.fill_between(n, low, [m + s for m, s in zip(mean, spread, strict=True)], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(target)
        axes.set_xlabel("training samples")
        axes.set_ylabel("test error / variance")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--samples", type=int, nargs="+", help="numbers of training samples")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="start anew; an earlier run is kept")
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
