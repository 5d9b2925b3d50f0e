"""Random-feature attention: features against a direct loop over heads, the Gram matrix against a plain product.

    python scripts/benchmarks/random_feature_attention.py --json rfa.json

`speedup` is the time of the direct form over ours, at the paper's size (d = N = 16, 1000 heads), so that it should be large. The
loop computes each head's scores and features for all samples at once, and no more than that. `memory` is the peak of our
features over that of all scores `(n, M, N)`, what `features` itself holds not counted, each in a fresh process. Outputs have to agree before anything is
measured.
"""

import argparse
import json
from pathlib import Path

import torch
from _common import alternating_times, peak_memory, print_table, run_fresh, write_json

from hf_attn.modeling.random_feature_attention.features import append_one, attention_features
from hf_attn.modeling.random_feature_attention.ridge import gram_matrix
from hf_attn.modeling.random_feature_attention.targets import sphere


DIM, KEYS, HEADS = 16, 16, 1000
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def loop_over_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The peer: head by head."""
    query, keys = append_one(x[:, 0]), append_one(x[:, 1:])
    features = []
    for head in weight:
        scores = torch.einsum("nia,na->ni", keys, query @ head).relu()
        features.append(torch.einsum("ni,nia->na", scores, keys) / keys.shape[1])
    return torch.cat(features, 1)


def all_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All scores of all heads and samples at once."""
    query, keys = append_one(x[:, 0]), append_one(x[:, 1:])
    return torch.einsum("na,mac,nic->nmi", query, weight, keys).relu()


def inputs(samples: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = sphere(samples, KEYS + 1, DIM, generator=generator)
    weight = torch.randn(HEADS, DIM + 1, DIM + 1, generator=generator, dtype=torch.float64) / 2
    return x.to(DTYPES[dtype]), weight.to(DTYPES[dtype])


def best(callables: dict, repeats: int) -> dict[str, float]:
    return {name: min(times) for name, times in alternating_times(callables, repeats).items()}


def measure_peak(side: str, samples: int) -> None:
    """Body of the fresh process."""
    function = attention_features if side == "ours" else all_scores
    x, weight = inputs(samples, "float32")
    function(x[:2], weight)
    held = samples * HEADS * (DIM + 1) * 4 if side == "ours" else 0
    print(json.dumps({"bytes": max(peak_memory(lambda: function(x, weight)) - held, 0)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--gram_samples",
        type=int,
        default=1024,
        help="number of rows of the feature matrix in the Gram matrix benchmark",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=("ours", "all scores"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure_peak(options.peak, options.samples)
        return

    rows = []
    for dtype in DTYPES:
        x, weight = inputs(options.samples, dtype)
        torch.testing.assert_close(attention_features(x, weight), loop_over_heads(x, weight))
        sides = {
            "direct": lambda x=x, weight=weight: loop_over_heads(x, weight),
            "ours": lambda x=x, weight=weight: attention_features(x, weight),
        }
        rows.append({"part": "features", "dtype": dtype, **best(sides, options.repeats)})
    features = attention_features(*inputs(options.gram_samples, "float64"))
    torch.testing.assert_close(gram_matrix(features), features @ features.T)
    sides = {"direct": lambda: features @ features.T, "ours": lambda: gram_matrix(features)}
    rows.append({"part": "Gram matrix", "dtype": "float64", **best(sides, min(options.repeats, 3))})
    for row in rows:
        row["speedup"] = row["direct"] / row["ours"]
    print_table(rows)
    peaks = {
        side: run_fresh(__file__, "--peak", side, "--samples", options.samples)["bytes"]
        for side in ("ours", "all scores")
    }
    memory = peaks["ours"] / peaks["all scores"]
    print(
        f"peak memory: {peaks['ours'] / 2**20:.1f} MB, all scores {peaks['all scores'] / 2**20:.1f} MB: {memory:.3g}"
    )
    write_json(options.json, {"rows": rows, "peaks": peaks, "memory": memory})


if __name__ == "__main__":
    main()
