"""If a rank dies or hangs, the others end in bounded time with a message."""

import subprocess
import sys
import time

import pytest

from .processes import environment, free_port


SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch
from torch import distributed
from hf_attn.distributed import distributed_attention, LostRankError

layout, ending = sys.argv[1:]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
states = torch.randn(1, 2, 8, 4, requires_grad=True)
output = distributed_attention(states, states, states, layout=layout, timeout=5)
open(f"{os.environ['FOLDER']}/ready{rank}", "w").close()
while not all(os.path.exists(f"{os.environ['FOLDER']}/ready{r}") for r in range(3)):
    time.sleep(0.05)
if rank == 1:
    if ending == "dies":
        os._exit(7)
    time.sleep(60)
start = time.monotonic()
try:
    if ending == "dies":
        distributed_attention(states, states, states, layout=layout, timeout=5)
    else:
        output.sum().backward()
except LostRankError as error:
    print(f"LOST after {time.monotonic() - start:.0f} s: {error}", flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize(("layout", "ending"), [("ring", "dies"), ("key", "hangs")])
def test_the_other_ranks_end_with_a_message(layout, ending, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = []
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "3",
        "FOLDER": str(tmp_path),
    }
    start = time.monotonic()
    for rank in range(3):
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), layout, ending],
                env=environment(RANK=str(rank), **rendezvous),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = {rank: processes[rank].communicate(timeout=150) for rank in (0, 2)}
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - start < 150
    for rank, (printed, errors) in outputs.items():
        assert processes[rank].returncode == 3, errors
        assert printed.startswith("LOST after"), errors
        assert int(printed.split()[2]) <= 30
        assert f"Rank {rank} of 3 could not finish the" in printed
        assert "another rank has ended, hangs, or has different inputs" in printed
