"""BiFormer on the CPU against the same model with its attention written naively, in PyTorch operations.

    python scripts/benchmarks/biformer_cpu.py --json biformer_cpu.json

Naively means as the paper's equations and the official code have it: the regions are cut before the projections, keys and
values are gathered along an expanded axis, scores and softmax are written out. A speed-up above 1 means that this package
is faster; times are medians of alternating repeats.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from _common import alternating_medians, print_table, write_json
from torch import nn

from hf_attn.modeling.biformer.configuration_biformer import BiFormerConfig
from hf_attn.modeling.biformer.modeling_biformer import (
    BiFormerForImageClassification,
    BiFormerFullAttention,
    BiFormerRoutingAttention,
)


def softmax_attention(query, key, value, num_heads: int, scaling: float):
    """`(batch, tokens, channels)` -> `(batch, tokens, channels)`."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query * scaling @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


class NaiveRoutingAttention(nn.Module):
    """Bi-level routing attention with the weights of ours."""

    def __init__(self, attention: BiFormerRoutingAttention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        attention, side = self.attention, self.attention.n_win
        batch, height, width, channels = hidden_states.shape
        rows, columns = height // side, width // side
        regions = hidden_states.view(batch, side, rows, side, columns, channels).transpose(2, 3)
        regions = regions.reshape(batch, side * side, rows, columns, channels)
        query, key_value = attention.qkv(regions).split([attention.qk_dim, attention.qk_dim + channels], dim=-1)
        query_mean, key_mean = query.mean((2, 3)), key_value[..., : attention.qk_dim].mean((2, 3))
        scores = (query_mean.detach() * attention.scaling) @ key_mean.detach().transpose(-1, -2)
        index = scores.topk(attention.router.topk, dim=-1).indices

        tokens = key_value.flatten(2, 3)
        expanded = tokens[:, None].expand(-1, side * side, -1, -1, -1)
        gathered = torch.gather(expanded, 2, index[..., None, None].expand(-1, -1, -1, *tokens.shape[2:]))
        key, value = gathered.flatten(2, 3).flatten(0, 1).split([attention.qk_dim, channels], dim=-1)
        query = query.flatten(2, 3).flatten(0, 1)
        output = softmax_attention(query, key, value, attention.num_heads, attention.scaling)

        def as_map(x):
            x = x.reshape(batch, side, side, rows, columns, channels).transpose(2, 3)
            return x.reshape(batch, height, width, channels)

        values = as_map(key_value[..., attention.qk_dim :]).contiguous()
        return attention.proj(as_map(output) + attention.lepe(values)), None


class NaiveFullAttention(nn.Module):
    """Full attention with LePE of its input, with the weights of ours."""

    def __init__(self, attention: BiFormerFullAttention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        attention = self.attention
        tokens = [x.flatten(1, 2) for x in attention.qkv(hidden_states).chunk(3, dim=-1)]
        output = softmax_attention(*tokens, attention.num_heads, attention.scaling).view_as(hidden_states)
        return attention.proj(output + attention.lepe(hidden_states)), None


def naive(model: nn.Module) -> nn.Module:
    """A copy of a model with its attention written naively."""
    model = copy.deepcopy(model)
    for stage in model.biformer.encoder.stages:
        for layer in stage.layers:
            is_routing = isinstance(layer.attention, BiFormerRoutingAttention)
            layer.attention = (NaiveRoutingAttention if is_routing else NaiveFullAttention)(layer.attention)
    return model


def forward(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def forward_backward(model, pixel_values):
    model.zero_grad()
    model(pixel_values).logits.sum().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=BiFormerConfig.variants, default="biformer_tiny")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="output file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = BiFormerConfig.from_variant(arguments.variant)
    models = {"naive": naive(BiFormerForImageClassification(config).eval())}
    for implementation in ("eager", "sdpa"):
        models[implementation] = BiFormerForImageClassification(config).eval()
        models[implementation].load_state_dict(
            {name.replace("attention.attention.", "attention."): x for name, x in models["naive"].state_dict().items()}
        )
        models[implementation].set_attn_implementation(implementation)

    rows = []
    for batch_size in arguments.batch_sizes:
        pixel_values = torch.randn(batch_size, 3, config.image_size, config.image_size)
        for implementation in ("eager", "sdpa"):
            torch.testing.assert_close(
                forward(models[implementation], pixel_values),
                forward(models["naive"], pixel_values),
                rtol=1e-4,
                atol=1e-4,
            )
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            row = {"batch": batch_size, "threads": threads}
            for direction, run in (("forward", forward), ("both", forward_backward)):
                calls = {name: partial(run, model, pixel_values) for name, model in models.items()}
                seconds = alternating_medians(calls, arguments.repeats)
                row[f"{direction}_naive_ms"] = 1000 * seconds["naive"]
                for name in ("eager", "sdpa"):
                    row[f"{direction}_{name}_speedup"] = seconds["naive"] / seconds[name]
            rows.append(row)
    print_table(rows)
    write_json(arguments.json, {"variant": arguments.variant, "times": rows})


if __name__ == "__main__":
    main()
