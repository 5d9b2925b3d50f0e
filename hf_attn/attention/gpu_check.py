"""Implementation of `hf-attn check-gpu`: correctness and speed of every GPU kernel on the current GPU."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch.nn import functional as F

from ..kernels.call import AttentionCall, Refusal
from . import LANDMARK, MECHANISMS
from .conformance import CLEAR, DISENTANGLED, DTYPES, WINDOW, Case, cases, compare, on_device
from .dispatch import AttentionFunction, Implementation


FUNCTIONS: tuple[AttentionFunction, ...] = (*MECHANISMS, CLEAR, WINDOW, DISENTANGLED)


@dataclass
class Result:
    """Results of a kernel in a dtype.

    Attributes:
        kernel: name in the record, such as `"sigmoid_triton"`.
        dtype: such as `"float16"`.
        exact: number of cases with an exact output and exact gradients.
        refused: number of cases that the kernel does not support, which is not an error.
        left: number of cases that there was no time for.
        faults: errors, by case.
        over_eager: time of the specification over that of the kernel, forward and backward.
        over_sdpa: the same of softmax attention by `F.scaled_dot_product_attention`.
    """

    kernel: str
    dtype: str
    exact: int = 0
    refused: int = 0
    left: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    over_eager: float | None = None
    over_sdpa: float | None = None

    @property
    def passed(self) -> bool:
        return self.exact > 0 and not self.faults and not self.left


def gpu_kernels(
    functions: Iterable[AttentionFunction] = FUNCTIONS,
) -> Iterator[tuple[AttentionFunction, Implementation]]:
    for function in functions:
        for implementation in function.implementations:
            if implementation.gpu_kernel:
                yield function, implementation


def check_kernels(
    device: torch.device,
    seconds: float,
    functions: Iterable[AttentionFunction] = FUNCTIONS,
    choose_cases: Callable[[AttentionFunction], Iterable[Case]] = cases,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Compare every GPU kernel with its specification.

    Args:
        device: to run on.
        seconds: after which no further case begins; a kernel with cases left has not passed.
        functions: whose kernels are run.
        choose_cases: the cases of a function.
        progress: called with a description of each case.

    Returns:
        A result for each kernel and dtype.
    """
    stop = time.monotonic() + seconds
    results: dict[tuple[str, torch.dtype], Result] = {}
    work = []
    for function, implementation in gpu_kernels(functions):
        kernel = f"{function.name}_{implementation.name}"
        for dtype in DTYPES:
            results[kernel, dtype] = Result(kernel, str(dtype).removeprefix("torch."))
        work.append([(results[kernel, case.dtype], function, implementation, case) for case in choose_cases(function)])
    # One case of each kernel in turn, so that no kernel takes the time of all others.
    for result, function, implementation, case in filter(None, (item for turn in zip_longest(*work) for item in turn)):
        if time.monotonic() > stop:
            result.left += 1
            continue
        progress(f"{result.kernel} {result.dtype} {case.name}")
        try:
            report = compare(function, implementation, case, device)
        except Exception as error:  # such as a kernel that does not compile
            report = f"{type(error).__name__}: {error}"
        if isinstance(report, Refusal):
            result.refused += 1
        elif report:
            result.faults[case.name] = report
        else:
            result.exact += 1
    return list(results.values())


def long_call(function: AttentionFunction, dtype: torch.dtype, size: int) -> AttentionCall:
    """A call of the size that kernels are for: causal with `size` tokens, or a text, an image or windows of as many."""
    if function is CLEAR:
        side = math.isqrt(size)
        query, key, value = (torch.randn(1, 24, side * side, 128, dtype=dtype) for _ in range(3))
        return CLEAR.call(query, key, value, grid=(side, side), radius=8)
    if function is WINDOW:
        query, key, value = (torch.randn(max(1, size // 64), 6, 256, 32, dtype=dtype) for _ in range(3))
        bias = torch.randn(1, 6, 256, 256, dtype=dtype)
        return WINDOW.call(query, key, value, position_bias=bias, module=torch.nn.Module())
    query, key, value = (torch.randn(1, 16, size, 64, dtype=dtype) for _ in range(3))
    if function is DISENTANGLED:
        tables = {name: torch.randn(16, 512, 64, dtype=dtype) for name in ("position_key", "position_query")}
        rows = (torch.arange(2 * size - 1) - size + 257).clamp(0, 511)
        return DISENTANGLED.call(query, key, value, rows=rows, **tables)
    fields = {}
    if function is LANDMARK:
        fields["is_landmark"] = (torch.arange(size) % 64 == 63)[None]
    return function.call(query, key, value, is_causal=True, **fields)


def _softmax(call: AttentionCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=call.is_causal)


def measure_speed(result: Result, device: torch.device, size: int = 2048, repeats: int = 10) -> None:
    """Fill in how many times as fast a kernel is as its specification and as softmax attention, forward and backward.

    They stay empty where the specification, which holds all weights, does not fit into the memory.
    """
    function, implementation = next((f, i) for f, i in gpu_kernels() if f"{f.name}_{i.name}" == result.kernel)
    eager = function.implementations[-1]
    call = on_device(long_call(function, getattr(torch, result.dtype), size), device)
    call.query, call.key, call.value = (tensor.requires_grad_() for tensor in (call.query, call.key, call.value))
    found = implementation.check(call)
    if isinstance(found, Refusal):
        return
    functions = {
        "kernel": lambda: implementation.compute(call, found)[0],
        "eager": lambda: eager.compute(call, eager.check(call))[0],
        "sdpa": lambda: _softmax(call),
    }
    try:
        seconds = _alternating(functions, (call.query, call.key, call.value), device, repeats)
    except torch.OutOfMemoryError:
        return
    result.over_eager = seconds["eager"] / seconds["kernel"]
    result.over_sdpa = seconds["sdpa"] / seconds["kernel"]


def _alternating(functions, leaves, device: torch.device, repeats: int) -> dict[str, float]:
    """Smallest time of each function with its backward pass, all of them in turn."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    best = dict.fromkeys(functions, math.inf)
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            output = function()
            torch.autograd.grad(output, leaves, torch.ones_like(output))
            wait(device)
            if repeat >= 2:  # the first ones compile
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def record_of(results: Iterable[Result]) -> dict[str, list[str]]:
    """Kernel -> dtypes in which it passed, for [`hf_attn.kernels.gpu_record.write_record`]."""
    record: dict[str, list[str]] = {}
    for result in results:
        record.setdefault(result.kernel, [])
        if result.passed:
            record[result.kernel].append(result.dtype)
    return record


def table(results: Iterable[Result]) -> str:
    """The results as text, one line for each kernel and dtype, followed by the errors."""
    rows = [("KERNEL", "DTYPE", "RESULT", "EXACT", "REFUSED", "FAULTS", "LEFT", "x EAGER", "x SDPA")]
    results = list(results)
    for result in results:
        speeds = ("-" if speed is None else f"{speed:.2f}" for speed in (result.over_eager, result.over_sdpa))
        verdict = "passed" if result.passed else "FAILED" if result.faults else "not passed"
        counts = map(str, (result.exact, result.refused, len(result.faults), result.left))
        rows.append((result.kernel, result.dtype, verdict, *counts, *speeds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        for case, fault in result.faults.items():
            lines.append(f"{result.kernel} {result.dtype} {case}: {fault.splitlines()[0][:300]}")
    return "\n".join(lines)
