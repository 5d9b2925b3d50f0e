"""Curves of the paper: test error against the number of training samples, for functions of a query and a set of keys.

Models are fitted by ridge regression with a penalty that is chosen on validation samples. Tokens are uniform on the unit sphere, labels
have no noise, and an error is the mean squared one over the variance of the target.
"""

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .configuration_random_feature_attention import RandomFeatureAttentionConfig, RandomFeatureMLPConfig
from .modeling_random_feature_attention import (
    RandomFeatureAttentionModel,
    RandomFeatureMLPModel,
    RandomFeaturePreTrainedModel,
)
from .ridge import gram_matrix, ridge_dual
from .targets import sphere, target_function


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
#: of a row of errors
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


def summarise(rows: list[dict[str, object]]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """(target, model, samples) -> mean and standard deviation of the error over seeds."""
    errors: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        errors.setdefault((row["target"], row["model"], row["samples"]), []).append(row["error"])
    return {key: (statistics.fmean(values), statistics.pstdev(values)) for key, values in errors.items()}


def draw_curves(summary: dict[tuple[str, str, int], tuple[float, float]], figure: "Figure") -> None:
    """Draw one panel a target, at most four beside each other: both axes logarithmic, one curve a model with its spread."""
    targets = list(dict.fromkeys(target for target, _, _ in summary))
    columns = min(4, len(targets))
    rows = -(-len(targets) // columns)
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


__all__ = ["COLUMNS", "MODELS", "SIZES", "TARGETS", "draw_curves", "make_models", "run_seed", "summarise"]
