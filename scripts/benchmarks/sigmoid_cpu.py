"""Sigmoid attention on the CPU against softmax attention of `F.scaled_dot_product_attention`, on the same tensors.

    python scripts/benchmarks/sigmoid_cpu.py --json sigmoid_cpu.json

A speed-up above 1 means that sigmoid attention is faster; times are medians of alternating repeats. Peak memory is what
a fresh process holds at most beyond the inputs, in MiB; it includes output and gradients.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, run_fresh, write_json
from torch.nn import functional as F

from hf_attn.attention.sigmoid import SigmoidCall, sigmoid_attention_eager
from hf_attn.kernels.sigmoid.blockwise import sigmoid_attention_blockwise


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sigmoid(query, key, value, causal):
    return sigmoid_attention_blockwise(SigmoidCall(query, key, value, bias=-math.log(key.shape[2]), is_causal=causal))


def softmax(query, key, value, causal):
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


ATTENTION = {"sigmoid": sigmoid, "softmax": softmax}


def make_inputs(length: int, heads: int, head_dim: int, dtype: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, head_dim).to(DTYPES[dtype]) for _ in range(3)]


def forward(attention, inputs, causal):
    attention(*inputs, causal)


def forward_backward(attention, inputs, causal):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attention(*inputs, causal)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def check(inputs: list[torch.Tensor], causal: bool) -> None:
    """No figure while wrong: one head must equal the specification, computed in float32."""
    output = sigmoid(*inputs, causal)[:, :1].float()
    query, key, value = (tensor[:, :1].float() for tensor in inputs)
    expected, _ = sigmoid_attention_eager(
        SigmoidCall(query, key, value, bias=-math.log(key.shape[2]), is_causal=causal)
    )
    rounding = torch.finfo(inputs[0].dtype).eps
    torch.testing.assert_close(output, expected, rtol=rounding, atol=max(rounding * float(expected.abs().max()), 1e-6))


def peak_beyond_inputs(arguments: argparse.Namespace) -> None:
    """Body of the fresh process."""
    attention = ATTENTION[arguments.measure_peak]
    run = forward_backward if arguments.backward else forward
    # Libraries allocate their own memory at the first call.
    run(attention, make_inputs(64, arguments.heads, arguments.head_dim, arguments.dtypes[0]), causal=False)
    inputs = make_inputs(arguments.lengths[0], arguments.heads, arguments.head_dim, arguments.dtypes[0])
    print(json.dumps({"bytes": peak_memory(lambda: run(attention, inputs, causal=False))}))


def measure_peaks(length: int, dtype: str, arguments: argparse.Namespace) -> dict[str, float]:
    peaks = {}
    for direction, flags in (("forward", ()), ("both", ("--backward",))):
        for name in ATTENTION:
            shape = (
                "--lengths",
                length,
                "--dtypes",
                dtype,
                "--heads",
                arguments.heads,
                "--head-dim",
                arguments.head_dim,
            )
            result = run_fresh(__file__, "--measure-peak", name, *shape, *flags)
            peaks[f"{direction}_{name}"] = result["bytes"] / 2**20
    return peaks


def measure_time(inputs: list[torch.Tensor], causal: bool) -> dict[str, float]:
    """Milliseconds of sigmoid attention and its speed-up over softmax attention, forward and forward with backward."""
    repeats = max(5, min(41, 16384 // inputs[0].shape[2]))
    row = {}
    for direction, run in (("forward", forward), ("both", forward_backward)):
        calls = {name: partial(run, attention, inputs, causal) for name, attention in ATTENTION.items()}
        seconds = alternating_medians(calls, repeats)
        row[f"{direction}_ms"] = 1000 * seconds["sigmoid"]
        row[f"{direction}_speedup"] = seconds["softmax"] / seconds["sigmoid"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--masks", nargs="+", choices=("full", "causal"), default=["full", "causal"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a short run: lengths 512 and 1024, one thread")
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", choices=ATTENTION, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_peak:
        peak_beyond_inputs(arguments)
        return
    if arguments.quick:
        arguments.lengths, arguments.threads = [512, 1024], [1]

    times, peaks = [], []
    for dtype in arguments.dtypes:
        for length in arguments.lengths:
            inputs = make_inputs(arguments.lengths[0], arguments.heads, arguments.head_dim, dtype)
            for mask in arguments.masks:
                check(inputs, mask == "causal")
                for threads in arguments.threads:
                    torch.set_num_threads(threads)
                    row = {"dtype": dtype, "length": length, "mask": mask, "threads": threads}
                    times.append(row | measure_time(inputs, mask == "causal"))
            peaks.append({"dtype": dtype, "length": length} | measure_peaks(length, dtype, arguments))
    print_table(times)
    print("\nPeak memory beyond the inputs in MiB, full attention:")
    print_table(peaks)
    result = {"heads": arguments.heads, "head_dim": arguments.head_dim, "times": times, "peaks_mib": peaks}
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
