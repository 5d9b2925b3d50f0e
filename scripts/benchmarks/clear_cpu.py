"""CLEAR attention on the CPU against full attention of `F.scaled_dot_product_attention`, on the same tensors.

    python scripts/benchmarks/clear_cpu.py --json clear_cpu.json          # everything, about half an hour
    python scripts/benchmarks/clear_cpu.py --radii 8 --text 512 --head-dims 64 --threads 1 --sections attention

Three sections, all in float32:

- `attention`: medians of alternating repeats, one head by default. A speed-up above 1 means that CLEAR is faster. The slope
  is that of time against image tokens between a row and the one before it in log-log: 1 is linear, 2 is quadratic.
- `memory`: what a fresh process holds at most beyond the inputs, in MiB. Full attention never has all logits at once.
- `transformer`: a step of a narrow FLUX transformer with either attention.

Full attention is left out where a call of it would take longer than `--full-limit` seconds, by the calls before. The last
lines compare with the project's marks what was measured of them.
"""

import argparse
import json
import math
from itertools import product
from pathlib import Path

import torch
from _common import alternating_medians, peak_memory, print_table, run_fresh, write_json
from torch.nn import functional as F

from hf_attn.attention.clear import clear_attention


SECTIONS = ("attention", "memory", "transformer")
# At one thread, radius 8 and 512 text tokens: image tokens -> least speed-up; and the largest slope from 4096 tokens on.
SPEEDUP_MARKS = {4096: 1.7, 16384: 8.0}
SLOPE_MARK = 1.1


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
        expected = clear_attention(*inputs, grid=(40, 40), radius=radius, attn_implementation="eager")
        torch.testing.assert_close(clear(inputs, 40, radius), expected)


def repeats_of(tokens: int) -> dict[str, int]:
    return {"repeats": max(3, min(21, 131072 // tokens)), "warmup": int(tokens <= 16384)}


class FullAttentionLimit:
    """Predicts whether full attention would take too long, from its last measured time."""

    def __init__(self, seconds: float):
        self.limit, self.tokens, self.seconds = seconds, None, None

    def allows(self, tokens: int) -> bool:
        if self.tokens is None:
            return True
        expected = self.seconds * (tokens / self.tokens) ** 2
        if expected > self.limit:
            print(f"Full attention with {tokens} tokens is skipped: a call would take about {expected:.0f} s.")
        return expected <= self.limit

    def note(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = tokens, seconds


def attention_rows(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for threads, head_dim, text_length in product(arguments.threads, arguments.head_dims, arguments.text):
        torch.set_num_threads(threads)
        limit, before = FullAttentionLimit(arguments.full_limit), {}
        for tokens in arguments.tokens:
            side = math.isqrt(tokens)
            inputs = make_inputs(side, text_length, head_dim, arguments.heads)
            calls = {f"r{radius}": lambda r=radius: clear(inputs, side, r) for radius in arguments.radii}  # noqa: B023
            if limit.allows(tokens):
                calls["full"] = lambda: full(inputs, side, None)  # noqa: B023
            seconds = alternating_medians(calls, **repeats_of(tokens))
            if "full" in seconds:
                limit.note(tokens, seconds["full"])
            for radius in arguments.radii:
                time, last = seconds[f"r{radius}"], before.get(radius)
                row = {"threads": threads, "head_dim": head_dim, "text": text_length, "r": radius, "tokens": tokens}
                row["clear_ms"] = 1000 * time
                row["full_ms"] = 1000 * seconds["full"] if "full" in seconds else None
                row["speedup"] = seconds["full"] / time if "full" in seconds else None
                row["slope"] = math.log(row["clear_ms"] / last["clear_ms"], tokens / last["tokens"]) if last else None
                before[radius] = row
                rows.append(row)
    rows.sort(key=lambda row: [row[name] for name in ("threads", "head_dim", "text", "r", "tokens")])
    return rows


def peak_beyond_inputs(arguments: argparse.Namespace) -> None:
    """Body of the fresh process."""
    torch.set_num_threads(1)
    attention = ATTENTION[arguments.measure_peak]
    side, text_length, radius = math.isqrt(arguments.tokens[0]), arguments.text[0], arguments.radii[0]
    # Libraries allocate their own memory at the first call.
    attention(make_inputs(32, text_length, arguments.head_dims[0], arguments.heads), 32, radius)
    inputs = make_inputs(side, text_length, arguments.head_dims[0], arguments.heads)
    print(json.dumps({"bytes": peak_memory(lambda: attention(inputs, side, radius))}))


def memory_rows(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for head_dim, text_length, radius in product(arguments.head_dims, arguments.text, arguments.radii):
        for tokens in arguments.tokens:
            shape = ("--tokens", tokens, "--text", text_length, "--radii", radius, "--head-dims", head_dim)
            row = {"head_dim": head_dim, "text": text_length, "r": radius, "tokens": tokens}
            for name in ATTENTION:
                result = run_fresh(__file__, "--measure-peak", name, "--heads", arguments.heads, *shape)
                row[f"{name}_mib"] = result["bytes"] / 2**20
            row["clear_bytes_a_token"] = row["clear_mib"] * 2**20 / tokens
            rows.append(row)
    return rows


def transformer_rows(arguments: argparse.Namespace) -> list[dict]:
    """Steps of a FLUX transformer that has everything but the width of FLUX.1 and most of its blocks."""
    from diffusers import FluxTransformer2DModel

    from hf_attn.patching.clear import apply_clear, remove_clear
    from hf_attn.patching.clear.distillation import image_ids

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=128,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    ).eval()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        limit = FullAttentionLimit(arguments.full_limit)
        for tokens in arguments.tokens:
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
                apply_clear(model, radius=arguments.radii[0])
                model(**inputs)  # noqa: B023

            @torch.no_grad()
            def with_full():
                remove_clear(model)
                model(**inputs)  # noqa: B023

            calls = {"clear": with_clear} | ({"full": with_full} if limit.allows(tokens) else {})
            seconds = alternating_medians(calls, repeats=3, warmup=int(tokens <= 16384))
            row = {"threads": threads, "r": arguments.radii[0], "tokens": tokens, "clear_ms": 1000 * seconds["clear"]}
            row["full_ms"] = row["speedup"] = None
            if "full" in seconds:
                limit.note(tokens, seconds["full"])
                row["full_ms"], row["speedup"] = 1000 * seconds["full"], seconds["full"] / seconds["clear"]
            rows.append(row)
    return rows


def print_marks(rows: list[dict]) -> None:
    for head_dim in sorted({row["head_dim"] for row in rows}):
        measured = {
            row["tokens"]: row
            for row in rows
            if (row["threads"], row["r"], row["text"], row["head_dim"]) == (1, 8, 512, head_dim)
        }
        for tokens, mark in SPEEDUP_MARKS.items():
            if tokens in measured and measured[tokens]["speedup"]:
                speedup = measured[tokens]["speedup"]
                verdict = "met" if speedup >= mark else "missed"
                print(f"head dim {head_dim}, {tokens} tokens: {speedup:.2f} times as fast, mark {mark}: {verdict}")
        if 4096 in measured and max(measured) > 4096:
            first, last = measured[4096], measured[max(measured)]
            slope = math.log(last["clear_ms"] / first["clear_ms"], last["tokens"] / first["tokens"])
            verdict = "met" if slope <= SLOPE_MARK else "missed"
            print(
                f"head dim {head_dim}, slope from 4096 to {max(measured)} tokens: {slope:.2f}, mark {SLOPE_MARK}: {verdict}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 65536], help="squares")
    parser.add_argument("--text", nargs="+", type=int, default=[0, 512])
    parser.add_argument("--radii", nargs="+", type=int, default=[8, 16], help="the transformer has the first")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="memory is measured with one")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--full-limit", type=float, default=60, help="seconds")
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure-peak", choices=ATTENTION, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_peak:
        peak_beyond_inputs(arguments)
        return
    if any(math.isqrt(tokens) ** 2 != tokens for tokens in arguments.tokens):
        parser.error("--tokens must be square numbers")

    check()
    measure = {"attention": attention_rows, "memory": memory_rows, "transformer": transformer_rows}
    titles = {
        "attention": "Attention:",
        "memory": "Peak memory beyond the inputs:",
        "transformer": "A step of a FLUX transformer of 3 blocks, 2 heads of 128, 512 text tokens:",
    }
    result = {}
    for section in SECTIONS:
        if section in arguments.sections:
            result[section] = measure[section](arguments)
            print(f"\n{titles[section]}")
            print_table(result[section])
    print_marks(result.get("attention", []))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
