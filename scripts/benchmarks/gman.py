"""GMAN against torch-geometric-temporal's network with the same weights: time and peak memory of inference and training.

    python scripts/benchmarks/gman.py --json gman.json

`speedup` is the peer's time over ours and `memory` our peak memory over the peer's, so that the first should be large and the
second small. A training step is forward, masked loss, backward and a step of Adam. `spatial` is the spatial attention of one
block by itself, with backward in `train`. Times are medians of alternating repeats; peak memory is what a fresh process holds
at most beyond weights and inputs. Before anything is measured the outputs have to be equal.

The peer is read from the file of its module alone, because its package cannot be imported without torch-sparse.
"""

import argparse
import ctypes
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, relative_to, run_fresh, write_json
from transformers.utils import logging

from hf_attn import from_official
from hf_attn.modeling.gman.metrics import masked_mae


#: blocks and causal mask of the published sizes
SIZES = {"pems": (1, False), "paper": (3, True)}
SIDES = ("ours", "peer")
STEPS, SLOTS = 12, 288


def peer_module():
    """The module of torch-geometric-temporal that holds its GMAN."""
    package = importlib.util.find_spec("torch_geometric_temporal")
    if package is None:
        raise SystemExit(
            "This benchmark needs the reference implementation: pip install --no-deps torch-geometric-temporal==0.56.2"
        )
    path = Path(package.origin).parent / "nn" / "attention" / "gman.py"
    spec = importlib.util.spec_from_file_location("torch_geometric_temporal_gman", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_arguments(blocks: int, causal: bool) -> dict[str, object]:
    """Arguments of the peer's constructor, for heads and widths of the paper."""
    sizes = {"L": blocks, "K": 8, "d": 8, "num_his": STEPS, "steps_per_day": SLOTS}
    return {**sizes, "bn_decay": 0.1, "use_bias": True, "mask": causal}


def networks(size: str, nodes: int, batch_size: int) -> dict[str, Callable[[bool], object]]:
    """Both networks, and inputs: side -> a function that runs inference, or a step of training, and returns the forecast."""
    torch.manual_seed(0)
    config = peer_arguments(*SIZES[size])
    peer = peer_module().GMAN(**config)
    embedding = torch.randn(nodes, 64)
    values = torch.randn(batch_size, STEPS, nodes)
    features = torch.stack(
        [torch.randint(7, (batch_size, 2 * STEPS)), torch.randint(SLOTS, (batch_size, 2 * STEPS))], dim=-1
    )
    truth = torch.randn(batch_size, STEPS, nodes)
    ours = from_official(
        "gman", peer.state_dict(), config={**config, "num_pred": STEPS, "spatial_embedding": embedding}
    )
    past, future = features.split(STEPS, dim=1)

    def our_forecast() -> torch.Tensor:
        return ours(values, past, future).prediction_outputs

    def peer_forecast() -> torch.Tensor:
        return peer(values, embedding, features)

    return {
        "ours": _runner(ours, our_forecast, truth),
        "peer": _runner(peer, peer_forecast, truth),
    }


def spatial_attentions(nodes: int, batch_size: int) -> dict[str, Callable[[bool], object]]:
    """The same of the spatial attention of one block."""
    torch.manual_seed(0)
    config = peer_arguments(1, False)
    network = peer_module().GMAN(**config)
    config |= {"num_pred": STEPS, "spatial_embedding": torch.randn(nodes, 64)}
    ours = from_official("gman", network.state_dict(), config=config).gman.encoder[0].spatial_attention
    peer = network._st_att_block1[0]._spatial_attention
    states, embeddings = (torch.randn(batch_size, STEPS, nodes, 64) for _ in range(2))
    both = torch.cat([states, embeddings], dim=-1)
    truth = torch.zeros_like(states)
    return {
        "ours": _runner(ours, lambda: ours(both)[0], truth),
        "peer": _runner(peer, lambda: peer(states, embeddings), truth),
    }


def _runner(
    model: torch.nn.Module, forecast: Callable[[], torch.Tensor], truth: torch.Tensor
) -> Callable[[bool], torch.Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run(training: bool) -> torch.Tensor:
        model.train(training)
        if not training:
            with torch.no_grad():
                return forecast()
        optimizer.zero_grad()
        prediction = forecast()
        masked_mae(prediction, truth, torch.ones_like(truth, dtype=torch.bool)).backward()
        optimizer.step()
        return prediction

    return run


def runners(part: str, nodes: int, batch_size: int) -> dict[str, Callable[[bool], object]]:
    return spatial_attentions(nodes, batch_size) if part == "spatial" else networks(part, nodes, batch_size)


def check(part: str) -> float:
    """Largest difference between both networks, in eval mode."""
    outputs = {side: run(False) for side, run in runners(part, 20, 2).items()}
    error = (outputs["ours"] - outputs["peer"]).abs().max().item()
    if error > 1e-4:
        raise SystemExit(f"{part}: the networks differ by {error}.")
    return error


def measure_peak(part: str, nodes: int, batch_size: int, training: bool, side: str) -> None:
    """Body of the fresh process."""
    run = runners(part, nodes, batch_size)[side]
    small = runners(part, 20, 1)[side]
    # Libraries allocate their own memory at the first call.
    small(training)
    ctypes.CDLL(None).malloc_trim(0)
    print(json.dumps({"bytes": peak_memory(lambda: run(training))}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("spatial", *SIZES), default=["spatial", *SIZES])
    parser.add_argument("--nodes", nargs="+", type=int, default=[207, 325])
    parser.add_argument("--modes", nargs="+", choices=("eval", "train"), default=["eval", "train"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_peak:
        training = arguments.modes == ["train"]
        measure_peak(arguments.parts[0], arguments.nodes[0], arguments.batch_size, training, arguments.measure_peak)
        return

    rows = []
    for part in arguments.parts:
        error = check(part)
        for nodes in arguments.nodes:
            calls = runners(part, nodes, arguments.batch_size)
            for mode in arguments.modes:
                seconds = alternating_medians(
                    {side: partial(run, mode == "train") for side, run in calls.items()}, arguments.repeats
                )
                flags = ("--parts", part, "--nodes", nodes, "--modes", mode, "--threads", arguments.threads)
                flags += ("--batch_size", arguments.batch_size)
                peaks = {side: run_fresh(__file__, "--measure-peak", side, *flags)["bytes"] for side in SIDES}
                rows.append(
                    {
                        "part": part,
                        "nodes": nodes,
                        "mode": mode,
                        "error": error,
                        **relative_to("peer", seconds, peaks),
                    }
                )
                print_table(rows[-1:])
    print()
    print_table(rows)
    write_json(arguments.json, {"threads": arguments.threads, "batch_size": arguments.batch_size, "rows": rows})


if __name__ == "__main__":
    main()
