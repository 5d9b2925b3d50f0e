"""CLEAR attention on the CPU against full attention of `F.scaled_dot_product_attention`, on the same tensors.

    python scripts/benchmarks/clear_cpu.py --json clear_cpu.json

A speed-up above 1 means that CLEAR is faster; times are medians of alternating repeats, float32, one head by default.
The last column of the first table is the slope of time against image tokens between a row and the one before it in
log-log: 1 is linear, 2 is quadratic. Peak memory is what a fresh process holds at most beyond the inputs, in MiB. The
second table is a step of a narrow FLUX transformer with either attention.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, run_fresh, write_json
from torch.nn import functional as F

from hf_attn.attention.clear import clear_attention


def make_inputs(side: int, text_length: int, head_dim: int, heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, side * side + text_length, head_dim) for _ in range(3)]


def clear(inputs, side, radius):
    return clear_attention(*inputs, grid=(side, side), radius=radius)


def full(inputs, side, radius):
    return F.scaled_dot_product_attention(*inputs)


ATTENTION = {"clear": clear, "full": full}


def check() -> None:
    """No figure while wrong: the fast path must equal the definition."""
    for radius, text_length in ((8, 512), (16, 0)):
        inputs = make_inputs(40, text_length, 64, 1)
        expected = clear_attention(*inputs, grid=(40, 40), radius=radius, backend="eager")
        torch.testing.assert_close(clear(inputs, 40, radius), expected)


def peak_beyond_inputs(arguments: argparse.Namespace) -> None:
    """Body of the fresh process."""
    attention = ATTENTION[arguments.measure_peak]
    side, text_length, radius = math.isqrt(arguments.tokens[0]), arguments.text[0], arguments.radii[0]
    # Libraries allocate their own memory at the first call.
    attention(make_inputs(32, text_length, arguments.head_dims[0], arguments.heads), 32, radius)
    inputs = make_inputs(side, text_length, arguments.head_dims[0], arguments.heads)
    print(json.dumps({"bytes": peak_memory(lambda: attention(inputs, side, radius))}))


def measure(tokens, text_length, radius, head_dim, threads, arguments, before) -> dict:
    side = math.isqrt(tokens)
    inputs = make_inputs(side, text_length, head_dim, arguments.heads)
    calls = {name: lambda f=f: f(inputs, side, radius) for name, f in ATTENTION.items()}
    if tokens > arguments.full_up_to:
        del calls["full"]
    seconds = alternating_medians(calls, repeats=max(3, min(21, 32768 // tokens)))
    row = {"threads": threads, "head_dim": head_dim, "r": radius, "text": text_length, "tokens": tokens}
    row["clear_ms"] = 1000 * seconds["clear"]
    row["full_ms"] = 1000 * seconds["full"] if "full" in seconds else None
    row["speedup"] = seconds["full"] / seconds["clear"] if "full" in seconds else None
    row["slope"] = math.log(row["clear_ms"] / before["clear_ms"], tokens / before["tokens"]) if before else None
    row["peak_mib"] = None
    if threads == 1:
        shape = ("--tokens", tokens, "--text", text_length, "--radii", radius, "--head-dims", head_dim)
        result = run_fresh(__file__, "--measure-peak", "clear", "--heads", arguments.heads, *shape)
        row["peak_mib"] = result["bytes"] / 2**20
    return row


def transformer_step(tokens: int) -> dict:
    """A step of a FLUX transformer that has everything but the width of FLUX.1 and most of its blocks."""
    from diffusers import FluxTransformer2DModel

    from hf_attn.patching.clear import apply_clear, remove_clear
    from hf_attn.patching.clear_distillation import image_ids

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=128,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    ).eval()
    side = math.isqrt(tokens)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, 512, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(side, side),
        "txt_ids": torch.zeros(512, 3),
    }

    @torch.no_grad()
    def with_clear():
        apply_clear(model, radius=8)
        model(**inputs)

    @torch.no_grad()
    def with_full():
        remove_clear(model)
        model(**inputs)

    seconds = alternating_medians({"clear": with_clear, "full": with_full}, repeats=3)
    return {
        "tokens": tokens,
        "clear_ms": 1000 * seconds["clear"],
        "full_ms": 1000 * seconds["full"],
        "speedup": seconds["full"] / seconds["clear"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536], help="squares")
    parser.add_argument("--text", nargs="+", type=int, default=[0, 512])
    parser.add_argument("--radii", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--full-up-to", type=int, default=16384, help="tokens beyond which full attention is left out")
    parser.add_argument(
        "--quick", action="store_true", help="a short run: r = 8, head dim 64, one thread, 4096 tokens"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--measure-peak", choices=ATTENTION, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_peak:
        peak_beyond_inputs(arguments)
        return
    if arguments.quick:
        arguments.tokens, arguments.radii, arguments.head_dims, arguments.threads = [1024, 4096], [8], [64], [1]
    if any(math.isqrt(tokens) ** 2 != tokens for tokens in arguments.tokens):
        parser.error("--tokens takes square numbers")

    torch.set_num_threads(arguments.threads[0])
    check()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for head_dim in arguments.head_dims:
            for radius in arguments.radii:
                for text_length in arguments.text:
                    before = None
                    for tokens in arguments.tokens:
                        before = measure(tokens, text_length, radius, head_dim, threads, arguments, before)
                        rows.append(before)
    print_table(rows)
    torch.set_num_threads(arguments.threads[0])
    steps = [transformer_step(tokens) for tokens in arguments.tokens if tokens <= arguments.full_up_to]
    print(f"\nA step of a FLUX transformer of 3 blocks, 2 heads of 128, r = 8, {arguments.threads[0]} thread(s):")
    print_table(steps)
    write_json(arguments.json, {"attention": rows, "transformer": steps})


if __name__ == "__main__":
    main()
