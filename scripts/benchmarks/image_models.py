"""Cost and speed of every image family of the catalogue, at its smallest published variant, against timm's ViTs.

    python scripts/benchmarks/image_models.py --json image_models.json

For each family: parameters, multiply-accumulates per image, images per second in the forward pass and in training, peak
memory of a fresh process beyond the loaded model, and how time grows from 224 to 512 pixels (the pixels grow by 5.2). The
peer is the ViT of timm (`vit_*`, `deit_*`) with the nearest number of multiply-accumulates at the size of the family;
`speed` is the family's images per second relative to the peer's at equal work: a speed of 1 means as many multiply-accumulates a
second as the peer. `vs_eager` is the time of the forward pass with the attention written out, as in the papers' own code,
over that of the default. Medians of alternating calls, float32, random weights.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import timm
import torch
from _common import alternating_medians, peak_memory, print_table, run_fresh, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from hf_attn.catalog import families
from hf_attn.registration import load


PEERS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch32_224", "deit_small_patch16_224")
FAMILIES = {family.model_type: family for family in families() if "AutoModelForImageClassification" in family.models}
GROWN_SIZE = 512


def smallest_config(model_type: str):
    """The published variant with the fewest parameters, and its name."""
    config_class = load(FAMILIES[model_type].config_reference)
    # BiFormer takes 512 pixels with padding only; at the published size there is none.
    options = {"auto_pad": True} if "auto_pad" in config_class.__dataclass_fields__ else {}
    names = getattr(config_class, "variants", {})
    variants = {name: config_class.from_variant(name, **options) for name in names} or {"default": config_class()}
    sizes = {}
    for name, config in variants.items():
        with torch.device("meta"):
            sizes[name] = AutoModelForImageClassification.from_config(config).num_parameters()
    name = min(sizes, key=sizes.get)
    return name, variants[name]


def macs(model: torch.nn.Module, pixel_values: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(pixel_values[:1])
    return counter.get_total_flops() // 2


def train_step(model: torch.nn.Module, pixel_values: torch.Tensor) -> None:
    model.train()
    output = model(pixel_values)
    getattr(output, "logits", output).sum().backward()
    model.zero_grad()
    model.eval()


def infer(model: torch.nn.Module, pixel_values: torch.Tensor) -> None:
    with torch.inference_mode():
        model(pixel_values)


def images(config_or_size, batch_size: int) -> torch.Tensor:
    size = config_or_size if isinstance(config_or_size, int) else config_or_size.image_size
    channels = getattr(config_or_size, "num_channels", 3)
    return torch.randn(batch_size, channels, size, size)


def peak_of_forward(model_type: str, batch_size: int) -> None:
    """Body of the fresh process."""
    _, config = smallest_config(model_type)
    model = AutoModelForImageClassification.from_config(config).eval()
    infer(model, images(config, 1))
    pixel_values = images(config, batch_size)
    print(json.dumps({"bytes": peak_memory(lambda: infer(model, pixel_values))}))


def growth(model_type: str, config, repeats: int) -> float | None:
    """Time of one image at 512 pixels over that at the published size; none if the family takes no other size."""
    model = AutoModelForImageClassification.from_config(config).eval()
    large = torch.randn(1, config.num_channels, GROWN_SIZE, GROWN_SIZE)
    arguments = {}
    try:
        infer(model, large)
    except (ValueError, RuntimeError):
        arguments = {"interpolate_pos_encoding": True}
        try:
            with torch.inference_mode():
                model(large, **arguments)
        except (TypeError, ValueError, RuntimeError):
            return None
    with torch.inference_mode():
        small = images(config, 1)
        calls = {"small": partial(model, small), "large": partial(model, large, **arguments)}
        seconds = alternating_medians(calls, repeats)
    return seconds["large"] / seconds["small"]


def measure(model_type: str, arguments: argparse.Namespace) -> dict[str, object]:
    variant, config = smallest_config(model_type)
    model = AutoModelForImageClassification.from_config(config).eval()
    # The counter supports the matrix products of this implementation.
    written_out = AutoModelForImageClassification.from_config(config, attn_implementation="eager").eval()
    cost = macs(written_out, images(config, 1))
    peers = {name: timm.create_model(name, img_size=config.image_size).eval() for name in PEERS}
    peer_costs = {name: macs(peer, images(config.image_size, 1)) for name, peer in peers.items()}
    peer = min(peers, key=lambda name: abs(peer_costs[name] - cost))
    batch = images(config, arguments.batch_size)
    peer_batch = images(config.image_size, arguments.batch_size)
    row = {
        "variant": variant,
        "pixels": config.image_size,
        "params_m": model.num_parameters() / 1e6,
        "gmacs": cost / 1e9,
        "peer": peer,
        "peer_gmacs": peer_costs[peer] / 1e9,
    }
    for name, run in (("forward", infer), ("train", train_step)):
        calls = {"ours": partial(run, model, batch), "peer": partial(run, peers[peer], peer_batch)}
        if name == "forward":
            calls["eager"] = partial(run, written_out, batch)
        seconds = alternating_medians(calls, arguments.repeats)
        row[f"{name}_img_s"] = arguments.batch_size / seconds["ours"]
        row[f"{name}_speed"] = seconds["peer"] / seconds["ours"] * cost / peer_costs[peer]
        if name == "forward":
            row["vs_eager"] = seconds["eager"] / seconds["ours"]
    peak = run_fresh(__file__, "--measure-peak", model_type, "--batch-size", arguments.batch_size)
    row["peak_mib"] = peak["bytes"] / 2**20
    row["growth_512"] = None if config.image_size != 224 else growth(model_type, config, arguments.repeats)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a short run: batch size 2, three repeats")
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", choices=FAMILIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.measure_peak:
        peak_of_forward(arguments.measure_peak, arguments.batch_size)
        return
    if arguments.quick:
        arguments.batch_size, arguments.repeats = 2, 3

    rows = [measure(model_type, arguments) for model_type in arguments.families]
    print_table(rows)
    settings = {"threads": arguments.threads, "batch_size": arguments.batch_size, "timm": timm.__version__}
    write_json(arguments.json, {**settings, "rows": rows})


if __name__ == "__main__":
    main()
