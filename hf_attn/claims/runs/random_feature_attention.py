"""Random-feature attention against a network of random features with as many trained weights, on the paper's kinds of targets.

Shown in small if, on each target of keys or query, attention with a quarter of the samples has a lower test error than the network with all of
them, for every seed; contradicted if on some target all seeds find it higher with the same number of samples. The biased form, which the
paper recommends for correlations, is reported.
"""

from ...modeling.random_feature_attention.curves import COLUMNS, draw_curves, run_seed, summarise
from ..result import Conclusion, Figure, agreement


TARGETS = ("key p=1", "key p=2", "query p=1", "corr p=1 q=1")
SAMPLES = (64, 256, 1024)


def measure(work) -> dict:
    samples, targets = ((8, 16, 64), TARGETS[:2]) if work.miniature else (SAMPLES, TARGETS)
    rows = []
    for seed in work.seeds:
        found = work.part(f"seed{seed}", run_seed, "small", seed, list(samples), list(targets))
        rows += [[row[column] for column in COLUMNS] for row in found]
    return {"rows": rows, "samples": list(samples)}


def _errors(data: dict, target: str, model: str, samples: int) -> list[float]:
    return [error for *key, _, error in data["rows"] if key == [target, model, samples]]


def conclude(data: dict) -> Conclusion:
    _, few, all_samples = data["samples"]
    targets = list(dict.fromkeys(row[0] for row in data["rows"]))
    figures, orders, same = [], [], []
    for target in (target for target in targets if not target.startswith("corr")):
        own, peer = _errors(data, target, "RFA", few), _errors(data, target, "RFMLP", all_samples)
        figures.append(
            Figure.of(
                f"test error, {target}, {few} samples",
                "of the variance",
                own,
                f"random-feature network, {all_samples} samples",
                peer,
            )
        )
        orders.append(agreement(peer, own))
        same.append(agreement(_errors(data, target, "RFMLP", all_samples), _errors(data, target, "RFA", all_samples)))
    for target in (target for target in targets if target.startswith("corr")):
        own, peer = _errors(data, target, "BRFA", few), _errors(data, target, "RFA", few)
        figures.append(
            Figure.of(
                f"test error of the biased form, {target}, {few} samples", "of the variance", own, "unbiased", peer
            )
        )
    why = (
        f"Attention with {few} samples has a lower error than the network with {all_samples} for every seed on "
        f"{sum(order > 0 for order in orders)} of {len(orders)} targets of keys or query."
    )
    if min(same) < 0:
        return Conclusion(tuple(figures), "contradicted here", why)
    return Conclusion(tuple(figures), "shown in small" if min(orders) > 0 else "not shown here", why)


def draw(data: dict, figure) -> None:
    draw_curves(summarise([dict(zip(COLUMNS, row, strict=True)) for row in data["rows"]]), figure)
