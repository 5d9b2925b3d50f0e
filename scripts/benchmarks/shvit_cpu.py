"""Latency of the fused SHViT-S4 on the CPU against timm's, plain and fused, and against MobileViTv2-1.0.

    python scripts/benchmarks/shvit_cpu.py --json shvit_cpu.json

A ratio above 1 means that our fused model is faster than the other. Times are medians of alternating calls, float32, random
weights and BatchNorm statistics; all models of a row run in one process. The paper states 8.1 against MobileViTv2-1.0.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import timm
import torch
from _common import alternating_medians, print_table, write_json

from hf_attn import from_official


def randomize_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Give every BatchNorm statistics and weights as after training; those of initialisation fold into zeros."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    plain = randomize_statistics(timm.create_model("shvit_s4"))
    fused = timm.create_model("shvit_s4").eval()
    fused.load_state_dict(plain.state_dict())
    return {
        "ours": from_official("shvit", plain.state_dict()).fuse(),
        "timm": plain,
        "timm_fused": fused.fuse(),
        "mobilevitv2_100": randomize_statistics(timm.create_model("mobilevitv2_100")),
    }


def check(models: dict[str, torch.nn.Module], size: int) -> None:
    """No figure while wrong: ours must equal timm's."""
    pixel_values = torch.randn(2, 3, size, size)
    expected = models["timm"](pixel_values)
    error = (models["ours"](pixel_values).logits - expected).abs().max() / expected.abs().max()
    if error > 1e-5:
        raise SystemExit(f"The fused model differs from timm's by {error:.1e} of the largest logit.")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="approximate duration of each row")
    parser.add_argument("--quick", action="store_true", help="a short run: batch size 1, one thread, 5 seconds")
    parser.add_argument("--json", type=Path, help="output file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch_sizes, arguments.threads, arguments.seconds = [1], [1], 5.0

    models = make_models()
    check(models, arguments.image_size)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch_size in arguments.batch_sizes:
            pixel_values = torch.randn(batch_size, 3, arguments.image_size, arguments.image_size)
            calls = {name: partial(model, pixel_values) for name, model in models.items()}
            start = time.perf_counter()
            alternating_medians(calls, repeats=1)
            round_seconds = (time.perf_counter() - start) / 2
            seconds = alternating_medians(calls, repeats=max(5, int(arguments.seconds / round_seconds)))
            row = {"threads": threads, "batch": batch_size, "ours_ms": 1000 * seconds["ours"]}
            row |= {f"vs_{name}": seconds[name] / seconds["ours"] for name in models if name != "ours"}
            rows.append(row)
    print_table(rows)
    write_json(arguments.json, {"image_size": arguments.image_size, "timm": timm.__version__, "rows": rows})


if __name__ == "__main__":
    main()
