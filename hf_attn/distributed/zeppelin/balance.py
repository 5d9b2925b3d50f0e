"""Balance of the attention work over processes of this machine, for a batch of uneven sequences and three placements."""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

from ..measure import idle_shares, measure_attention
from .engine import ZeppelinEngine
from .partition import default_capacity, even_partition, partition


#: two per node
PROCESSES = 4
HEAD_DIM = 64


@dataclass(frozen=True)
class Balance:
    """Medians over repeats.

    Attributes:
        tokens_a_second: throughput of forward and backward pass, in wall-clock time.
        busy: CPU seconds of attention of each process.
        idle: fraction of the busiest process's time in which each process waits.
    """

    tokens_a_second: float
    busy: tuple[float, ...]
    idle: tuple[float, ...]


def compare_on_processes(lengths: Sequence[int], heads: int = 4, repeats: int = 5) -> dict[str, Balance]:
    """Measure causal attention of a batch, forward and backward, on four gloo processes with one thread each.

    Args:
        lengths: tokens of each sequence.
        heads: number of attention heads.
        repeats: number of measurements, after a warm-up.

    Returns:
        Balances: `"Zeppelin"`, its plan; `"even ring"`, every sequence split evenly over all processes; `"padding"`, whole
        sequences distributed over the processes and padded to the longest.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_attend, args=(folder, tuple(lengths), heads, repeats), nprocs=PROCESSES)
        gathered = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    found = {}
    for name in gathered[0]:
        wall = statistics.median(max(walls) for walls in zip(*(rank[name]["wall"] for rank in gathered), strict=True))
        busy = [statistics.median(rank[name]["busy"]) for rank in gathered]
        found[name] = Balance(sum(lengths) / wall, tuple(busy), tuple(idle_shares(busy)))
    return found


def _attend(rank: int, folder: str, lengths: tuple[int, ...], heads: int, repeats: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    plans = {
        "Zeppelin": partition(lengths, 2, 2, default_capacity(lengths, PROCESSES)),
        "even ring": even_partition(lengths, 2, 2),
    }
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(sum(lengths), heads, HEAD_DIM, generator=generator) for _ in range(3)]
    steps = {}
    for name, plan in plans.items():
        engine = ZeppelinEngine(plan)
        local = [engine.shard(x).requires_grad_() for x in whole]
        steps[name] = lambda engine=engine, local=local: engine.attend(*local).sum().backward()
    rows = len(lengths[rank::PROCESSES])
    padded = [torch.randn(rows, heads, max(lengths), HEAD_DIM, requires_grad=True) for _ in range(3)]
    steps["padding"] = lambda: nn.functional.scaled_dot_product_attention(*padded, is_causal=True).sum().backward()
    found = {name: {"wall": [], "busy": []} for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            distributed.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            with measure_attention() as attention:
                step()
            busy = time.process_time() - cpu if name == "padding" else attention.seconds
            if turn:
                found[name]["wall"].append(time.perf_counter() - start)
                found[name]["busy"].append(busy)
    gathered = [None] * PROCESSES
    distributed.all_gather_object(gathered, found)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(gathered), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()
