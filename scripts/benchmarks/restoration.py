"""HAT-S x4 and DRCT x4 at their published sizes against spandrel's networks with the same random weights.

    python scripts/benchmarks/restoration.py --json restoration.json

`speedup` is spandrel's time over ours and `memory` our peak memory over spandrel's, so that the first should be large and
the second small. Times are medians of alternating repeats; peak memory is what a fresh process holds at most beyond
weights and input. Before anything is measured the outputs have to be equal: to 1e-5 in float32, and in bfloat16 no
further from spandrel's float32 output than spandrel's own bfloat16 is, twice over.
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, relative_to, run_fresh, write_json
from transformers.utils import logging

from hf_attn import from_official


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("ours", "spandrel")
PUBLISHED = {"depths": [6] * 6, "num_heads": [6] * 6, "window_size": 16, "mlp_ratio": 2, "upscale": 4}


def spandrel_network(name: str, size: int) -> torch.nn.Module:
    """The official architecture as spandrel keeps it, with random weights.

    Only masks depend on the size that it is made for; DRCT makes others at each call for other sizes.
    """
    torch.manual_seed(0)
    if name == "hat_s":
        from spandrel.architectures.HAT import HAT

        return HAT(embed_dim=144, compress_ratio=24, squeeze_factor=24, img_size=size, **PUBLISHED).eval()
    from spandrel.architectures.DRCT import DRCT

    return DRCT(embed_dim=180, gc=32, upsampler="pixelshuffle", img_size=size, **PUBLISHED).eval()


def networks(
    name: str, dtype: torch.dtype, size: int, sides=SIDES
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Both networks as functions of a float32 image."""
    official = spandrel_network(name, size)
    functions = {}
    if "ours" in sides:
        ours = from_official(name.split("_")[0], official.state_dict()).to(dtype)
        functions["ours"] = lambda image: ours(image).reconstruction
    if "spandrel" in sides:
        official.to(dtype)
        for module in official.modules():
            if name == "drct" and hasattr(module, "calculate_mask"):
                # Made in float32 for sizes that the network is not made for, which bfloat16 cannot add.
                module.calculate_mask = partial(_in_dtype, module.calculate_mask, dtype)
        functions["spandrel"] = lambda image: official(image.to(dtype)).float()
    return functions


def _in_dtype(function: Callable[..., torch.Tensor], dtype: torch.dtype, *args) -> torch.Tensor:
    return function(*args).to(dtype)


def check(name: str, dtype: str) -> float:
    """Largest error of ours in float32 or, in bfloat16, in units of spandrel's own."""
    image = torch.rand(1, 3, 32, 32)
    exact = networks(name, torch.float32, 32, ("spandrel",))["spandrel"](image)
    outputs = {side: function(image) for side, function in networks(name, DTYPES[dtype], 32).items()}
    errors = {side: (output - exact).abs().max().item() for side, output in outputs.items()}
    allowed = 1e-5 if dtype == "fp32" else 2 * errors["spandrel"] + torch.finfo(torch.bfloat16).eps
    if errors["ours"] > allowed:
        raise SystemExit(
            f"{name} in {dtype} differs from spandrel's network by {errors['ours']}, but only {allowed} is allowed."
        )
    return errors["ours"]


def measure_peak(name: str, dtype: str, size: int, side: str) -> None:
    """Body of the fresh process."""
    function = networks(name, DTYPES[dtype], size, (side,))[side]
    image = torch.rand(1, 3, size, size)
    # Libraries allocate their own memory at the first call.
    function(image[..., :32, :32])
    # What making the networks has freed would be used again without a rise.
    ctypes.CDLL(None).malloc_trim(0)
    print(json.dumps({"bytes": peak_memory(lambda: function(image))}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("hat_s", "drct"), default=["hat_s", "drct"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.measure_peak:
        measure_peak(arguments.models[0], arguments.dtypes[0], arguments.sizes[0], arguments.measure_peak)
        return

    rows = []
    for name in arguments.models:
        for dtype in arguments.dtypes:
            error = check(name, dtype)
            for size in arguments.sizes:
                functions = networks(name, DTYPES[dtype], size)
                image = torch.rand(1, 3, size, size)
                calls = {side: partial(function, image) for side, function in functions.items()}
                seconds = alternating_medians(calls, arguments.repeats)
                flags = ("--models", name, "--dtypes", dtype, "--sizes", size, "--threads", arguments.threads)
                peaks = {side: run_fresh(__file__, "--measure-peak", side, *flags)["bytes"] for side in SIDES}
                rows.append(
                    {
                        "model": name,
                        "dtype": dtype,
                        "size": size,
                        "error": error,
                        **relative_to("spandrel", seconds, peaks),
                    }
                )
                print_table(rows[-1:])
    print()
    print_table(rows)
    write_json(arguments.json, {"threads": arguments.threads, "rows": rows})


if __name__ == "__main__":
    main()
