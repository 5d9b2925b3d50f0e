"""Token mixers: time and peak memory against the length, with the slope of the time on logarithmic axes.

    python scripts/benchmarks/mixers.py --json mixers.json
    python scripts/benchmarks/mixers.py --lengths 1024 4096 16384 65536

`slope` is the power of the length that the time grows with between the last two lengths that were measured, `theory` that of the
template's table for long inputs, where logarithms count as 0. Lengths are skipped for a mixer, and shown as `-`, whose time or memory
would exceed the limits, judged by the shorter ones: with weights for each pair of positions 65,536 tokens take 16 GB. Memory is what the
resident set rises by in a run, weights and the input not counted.
"""

import argparse
import math
from pathlib import Path

import torch
from _common import alternating_times, peak_memory, print_table, write_json

from hf_attn.mixers import MIXERS, TokenMixer


#: power of the length in the time of mixing
THEORY = {
    "softmax": 2,
    "linear_elu": 1,
    "performer": 1,
    "linformer": 1,
    "window": 1,
    "nystrom_pinv": 1,
    "fourier": 1,
    "mlp_mixer": 1,
    "spatial_gating": 2,
    "synthesizer_random": 2,
    "aft_full": 2,
    "long_conv": 1,
    "gram_smoother": 2,
    "pooling": 1,
}


def make(name: str, length: int, options: argparse.Namespace) -> TokenMixer:
    torch.manual_seed(0)
    # As many hidden tokens at all lengths, so that the mixing network is linear in the length.
    mixer = TokenMixer.from_name(name, options.width, max_length=length, mixing_size=256)
    return mixer.eval().requires_grad_(False)


def squares(name: str) -> int:
    """Matrices with an entry for each pair of positions that a mixer holds, as weights and when it runs."""
    return {"spatial_gating": 1, "synthesizer_random": 3, "aft_full": 5}.get(name, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_seconds", type=float, default=10.0, help="of one run, as expected")
    parser.add_argument("--max_gigabytes", type=float, default=4.0, help="of matrices over pairs of positions")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = sorted(options.lengths)

    seconds: dict[str, dict[int, float]] = {name: {} for name in options.mixers}
    memory: dict[str, dict[int, int]] = {name: {} for name in options.mixers}
    for length in lengths:
        x = torch.randn(1, length, options.width, generator=torch.Generator().manual_seed(0))
        for name in options.mixers:
            earlier = list(seconds[name].items())
            expected = earlier[-1][1] * (length / earlier[-1][0]) ** THEORY[name] if earlier else 0
            missed = bool(earlier) and earlier[-1][0] != lengths[lengths.index(length) - 1]
            if missed or expected > options.max_seconds or squares(name) * length**2 * 4e-9 > options.max_gigabytes:
                continue
            mixer = make(name, length, options)
            times = alternating_times({name: lambda mixer=mixer, x=x: mixer(x)}, options.repeats)
            seconds[name][length] = min(times[name])
            memory[name][length] = peak_memory(lambda mixer=mixer, x=x: mixer(x))
            del mixer
    rows = []
    for name in options.mixers:
        points = list(seconds[name].items())
        slope = None
        if len(points) > 1:
            (before, start), (last, end) = points[-2:]
            slope = math.log(end / start) / math.log(last / before)
        milliseconds = {f"{length} ms": 1000 * s if (s := seconds[name].get(length)) else None for length in lengths}
        megabytes = memory[name][points[-1][0]] / 2**20 if points else None
        rows.append({"mixer": name, **milliseconds, "MB at last": megabytes, "slope": slope, "theory": THEORY[name]})
    print_table(rows)
    write_json(options.json, {"seconds": seconds, "bytes": memory, "rows": rows})


if __name__ == "__main__":
    main()
