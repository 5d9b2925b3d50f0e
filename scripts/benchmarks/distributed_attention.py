# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Distributed attention against one process: error, time, memory and bytes of each layout.

    python scripts/benchmarks/distributed_attention.py --json distributed_attention.json

Gloo processes on this machine, one thread each, causal, float32, forward pass. `error` is the largest difference to
scaled_dot_product_attention of one process; `seconds` the median over the repetitions of the slowest rank; `vs sdpa` that time over the time
of sdpa in one process, both measured in turns in the same run; `MiB` by how much a rank grows at most, the largest of all ranks; `sent` the
bytes that a rank sends. `materialised` is attention with a map of all queries and keys, the usual "vanilla" attention, up to
`--longest_materialised` tokens.

The paper reports almost 40x for distributed attention on four GPUs against vanilla attention on one. Four devices share the work of one
kernel at most four ways, so such a factor compares a streaming kernel with one that writes the whole map; the last column
shows that comparison here. Processes that share the cores of one machine do not get faster by their number.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import peak_memory, print_table, write_json
from torch import distributed, multiprocessing, nn

from hf_attn.distributed.exchange import Peers, count_sent_bytes
from hf_attn.distributed.functional import distributed_attention
from hf_attn.distributed.heads import head_spans
from hf_attn.distributed.sharding import Sharding, shard_tensor, unshard_tensor


LAYOUTS = ("ring", "query", "key", "head", "ulysses", "grid")
MIB = 2**20


def materialised(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention as its equation reads, with the whole map in memory."""
    length = query.shape[2]
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1) @ value


def states_of(length: int, options: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, options.heads, length, options.head_dim, generator=generator) for _ in range(3)]


def local_states(states: list[torch.Tensor], layout: str, sharding: Sharding, peers: Peers) -> list[torch.Tensor]:
    if layout == "head":
        heads = slice(*head_spans(states[0].shape[1], peers.size)[peers.rank])
        return [x[:, heads].contiguous() for x in states]
    return [shard_tensor(x, sharding, peers.rank, dim=2) for x in states]


def measure(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    """Run all layouts at all lengths in one process."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{size}", rank=rank, world_size=size)
    peers, rows = Peers(), []
    for length in options.lengths:
        states = states_of(length, options)
        for layout in options.layouts:
            split = "contiguous" if layout in ("head", "grid", "ulysses") else "zigzag"
            sharding = Sharding.make(length, size, split)
            local = local_states(states, layout, sharding, peers)

            def attend(layout=layout, split=split, local=local):
                return distributed_attention(*local, layout=layout, causal=True, split=split)

            def plain(states=states):
                return nn.functional.scaled_dot_product_attention(*states, is_causal=True)

            with count_sent_bytes() as sent:
                output = attend()
            times: dict[str, list[float]] = {"layout": [], "plain": []}
            for _ in range(options.repeats):
                distributed.barrier()
                start = time.perf_counter()
                attend()
                times["layout"].append(time.perf_counter() - start)
                distributed.barrier()
                # One process at a time, as if the others did not exist.
                if rank == 0:
                    start = time.perf_counter()
                    plain()
                    times["plain"].append(time.perf_counter() - start)
            memory = peak_memory(attend)
            slowest = peers.all_reduce(torch.tensor(times["layout"]), distributed.ReduceOp.MAX)
            largest = peers.all_reduce(torch.tensor(memory), distributed.ReduceOp.MAX)
            if layout == "head":
                spans = head_spans(options.heads, size)
                shapes = [(1, stop - start, *output.shape[2:]) for start, stop in spans]
                whole = torch.cat(peers.exchange([output] * size, shapes), 1)
            else:
                whole = unshard_tensor(output, sharding, peers, dim=2)
            if rank == 0:
                plain_seconds = statistics.median(times["plain"])
                seconds = statistics.median(slowest.tolist())
                rows.append(
                    {
                        "L": length,
                        "P": size,
                        "layout": layout,
                        "error": float((whole - plain()).abs().max()),
                        "seconds": seconds,
                        "vs sdpa": seconds / plain_seconds,
                        "sdpa seconds": plain_seconds,
                        "MiB": int(largest) / MIB,
                        "sent": sent.total,
                    }
                )
        if rank == 0 and size == 1 and length <= options.longest_materialised:
            start = time.perf_counter()
            materialised(*states)
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "L": length,
                    "P": 1,
                    "layout": "materialised",
                    "error": float((materialised(*states) - plain()).abs().max()),
                    "seconds": seconds,
                    "vs sdpa": seconds / rows[-1]["sdpa seconds"],
                    "sdpa seconds": rows[-1]["sdpa seconds"],
                    "MiB": peak_memory(lambda states=states: materialised(*states)) / MIB,
                    "sent": 0,
                }
            )
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--longest_materialised",
        type=int,
        default=4096,
        help="skip the eager implementation above this length, because its map has heads x L x L elements",
    )
    parser.add_argument("--json", type=Path, help="JSON output file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rows = []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        for size in options.processes:
            multiprocessing.spawn(measure, args=(size, folder, options), nprocs=size)
            rows += json.loads(Path(folder, f"{size}.json").read_text())
    vanilla = {row["L"]: row["seconds"] for row in rows if row["layout"] == "materialised"}
    for row in rows:
        row["materialised / this"] = vanilla[row["L"]] / row["seconds"] if row["L"] in vanilla else None
    print_table([{name: value for name, value in row.items() if name != "sdpa seconds"} for row in rows])
    single = [row for row in rows if row["P"] == 1 and row["layout"] == "ring"]
    if single:
        ratios = ", ".join(f"{row['vs sdpa']:.3f} at {row['L']}" for row in single)
        print(f"\nThe ring of one process over sdpa: {ratios} (target: at most 1.05)")
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
