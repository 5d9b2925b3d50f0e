"""Combiner attention on the CPU against causal softmax attention of `F.scaled_dot_product_attention`, on the same tensors.

    python scripts/benchmarks/combiner.py --json combiner.json

Ratios above 1 mean that Combiner is faster; times are minima of alternating repeats. Peak memory is what a fresh process
holds at most beyond the inputs, forward with backward, in MiB. A step of decoding reads the summaries of a whole context,
against softmax attention over its keys and values.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from _common import alternating_times, peak_memory, print_table, run_fresh, write_json
from torch.nn import functional as F

from hf_attn.attention.combiner import COMBINERS
from hf_attn.kernels.combiner.call import CombinerCall, default_segment_length
from hf_attn.kernels.combiner.decoding import CombinerState


#: length -> length of a segment
SEGMENTS = {4096: 64, 16384: 128, 65536: 256}


def combiner(query, key, value, kind, state=None):
    mechanism = COMBINERS[kind]
    segment_length = SEGMENTS.get(key.shape[2], default_segment_length(key.shape[2]))
    call = CombinerCall(query, key, value, kind=kind, segment_length=segment_length, is_causal=True, state=state)
    return mechanism(call, f"{mechanism.name}_torch")[0]


def softmax(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def make_inputs(length: int, arguments: argparse.Namespace) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, arguments.heads, length, arguments.head_dim) for _ in range(3)]


def forward(attention, inputs):
    with torch.no_grad():
        attention(*inputs)


def forward_backward(attention, inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attention(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def check(kind: str) -> None:
    """No figure while wrong: the fast form must equal the specification."""
    query, key, value = (torch.randn(1, 2, 500, 16) for _ in range(3))
    call = CombinerCall(query, key, value, kind=kind, segment_length=80, is_causal=True)
    mechanism = COMBINERS[kind]
    found, expected = (mechanism(call, f"{mechanism.name}_{name}")[0] for name in ("torch", "eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def measure_time(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, object]:
    inputs = make_inputs(length, arguments)
    row = {"kind": kind, "length": length, "segment": None if kind == "logsparse" else SEGMENTS.get(length)}
    for direction, run in (("forward", forward), ("both", forward_backward)):
        calls = {
            "combiner": partial(run, partial(combiner, kind=kind), inputs),
            "softmax": partial(run, softmax, inputs),
        }
        repeats = 1 if length > 20000 else max(2, min(9, 32768 // length))
        seconds = alternating_times(calls, repeats, warmup=0 if length > 20000 else 1)
        best = {name: min(values) for name, values in seconds.items()}
        row[f"{direction}_ms"] = 1000 * best["combiner"]
        row[f"{direction}_ratio"] = best["softmax"] / best["combiner"]
    return row


def measure_decoding(length: int, arguments: argparse.Namespace) -> dict[str, object]:
    inputs = make_inputs(length, arguments)
    tokens = [torch.randn(1, arguments.heads, 1, arguments.head_dim) for _ in range(3)]
    state = CombinerState()
    segment_length = SEGMENTS.get(length, default_segment_length(length))
    call = CombinerCall(*inputs, kind="fixed", segment_length=segment_length, is_causal=True, state=state)
    COMBINERS["fixed"](call)
    step = CombinerCall(*tokens, kind="fixed", segment_length=segment_length, state=state)
    calls = {
        "combiner": lambda: state.attend(step, None, None),
        "softmax": lambda: F.scaled_dot_product_attention(tokens[0], inputs[1], inputs[2]),
    }
    with torch.no_grad():
        seconds = alternating_times(calls, 40, warmup=3)
    best = {name: min(values) for name, values in seconds.items()}
    kept = sum(
        getattr(state, name).untyped_storage().nbytes() for name in ("query", "key", "value", "span_key", "span_value")
    )
    whole = sum(tensor.nbytes for tensor in inputs[1:])
    return {
        "decoding_at": length,
        "combiner_us": 1e6 * best["combiner"],
        "softmax_us": 1e6 * best["softmax"],
        "ratio": best["softmax"] / best["combiner"],
        "cache_ratio": whole / kept,
    }


def peak_beyond_inputs(arguments: argparse.Namespace) -> None:
    """Body of the fresh process."""
    attention = softmax if arguments.measure_peak == "softmax" else partial(combiner, kind=arguments.measure_peak)
    forward_backward(attention, make_inputs(256, arguments))
    inputs = make_inputs(arguments.lengths[0], arguments)
    print(json.dumps({"bytes": peak_memory(lambda: forward_backward(attention, inputs))}))


def measure_peaks(length: int, arguments: argparse.Namespace) -> dict[str, object]:
    row = {"length": length}
    for name in ("softmax", *arguments.kinds):
        shape = ("--lengths", length, "--heads", arguments.heads, "--head-dim", arguments.head_dim)
        row[f"{name}_mib"] = run_fresh(__file__, "--measure-peak", name, *shape)["bytes"] / 2**20
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--kinds", nargs="+", choices=("fixed", "logsparse", "vertical", "horizontal", "mixture"))
    parser.add_argument("--decoding", type=int, default=65536, help="context length of the decoding step")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds or ["fixed", "logsparse"]
    torch.set_num_threads(1)
    if arguments.measure_peak:
        peak_beyond_inputs(arguments)
        return
    for kind in arguments.kinds:
        check(kind)
    times = [measure_time(kind, length, arguments) for kind in arguments.kinds for length in arguments.lengths]
    print_table(times)
    decoding = [measure_decoding(arguments.decoding, arguments)]
    print()
    print_table(decoding)
    peaks = [measure_peaks(length, arguments) for length in arguments.lengths if length <= 20000]
    print("\nPeak memory beyond the inputs, forward with backward:")
    if peaks:
        print_table(peaks)
    result = {"heads": arguments.heads, "head_dim": arguments.head_dim}
    write_json(arguments.json, result | {"times": times, "decoding": decoding, "peaks": peaks})


if __name__ == "__main__":
    main()
