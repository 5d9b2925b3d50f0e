"""Shared functions of the benchmarks: alternating timing, peak memory, tables and JSON."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def alternating_medians(
    callables: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each callable, see [`alternating_times`]."""
    return {name: statistics.median(values) for name, values in alternating_times(callables, repeats, warmup).items()}


def alternating_times(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each callable, measured in turns, so that a change of the machine's load meets all of them.

    With `time.process_time` as the clock, other processes on the machine do not count.
    """
    for _ in range(warmup):
        for function in callables.values():
            function()
    seconds = {name: [] for name in callables}
    for _ in range(repeats):
        for name, function in callables.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process rises at most while `function` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, such as that of the imports
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_fresh(script: str | Path, *arguments: object) -> dict:
    """Run a script in a fresh interpreter and return the JSON object that is its last line of output."""
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {result.returncode}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print dictionaries with the same keys as an aligned table."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    for line in [header, ["-" * width for width in widths], *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_json(path: Path | None, result: Mapping[str, object]) -> None:
    """Write a result with the versions and the machine that it was measured on; do nothing without a path."""
    if path is None:
        return
    import torch

    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    path.write_text(json.dumps({**machine, **result}, indent=2) + "\n", encoding="utf-8")


def relative_to(peer: str, seconds: Mapping[str, float], peaks: Mapping[str, int]) -> dict[str, float]:
    """Time and peak memory of `ours`, absolute and relative to a peer, as columns of a table."""
    return {
        "seconds": seconds["ours"],
        "speedup": seconds[peer] / seconds["ours"],
        "peak_mib": peaks["ours"] / 2**20,
        "memory": peaks["ours"] / peaks[peer],
    }
