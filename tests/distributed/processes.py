"""Run a function in several gloo processes and return the results."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed, multiprocessing


def _run(rank: int, function: Callable, size: int, folder: str, timeout: float, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def in_processes(function: Callable, size: int, *arguments, timeout: float = 120) -> list:
    """Call `function(rank, *arguments)` in `size` processes of a gloo group, and return what each returned."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, args=(function, size, folder, timeout, arguments), nprocs=size)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(size)]


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    """Environment variables of this process, with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def set_launcher_variables(rank: int, size: int, port: int) -> None:
    """Set the variables of torchrun, with which Trainer and accelerate find the other processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
