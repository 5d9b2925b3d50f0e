"""Long sequences: exact attention over several processes, and token mixers."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed, multiprocessing, nn

from hf_attn import from_official
from hf_attn.distributed.exchange import Peers
from hf_attn.distributed.functional import distributed_attention, layout_spans, partial_attention
from hf_attn.distributed.heads import head_spans, project_heads
from hf_attn.distributed.sharding import Sharding, shard_tensor, unshard_tensor
from hf_attn.mixers import MIXERS

from ..case import Case


_NAME = re.compile(r"(head|query|ring|key|grid|ulysses)\.(contiguous|zigzag)\.rank(\d+)\.(\w+)")


class _Attention:
    """Weights, input and ranks of a layout in one process of a case."""

    def __init__(self, config: dict, weights: dict, x: torch.Tensor, cotangent: torch.Tensor):
        self.heads, self.causal, self.grid = config["num_heads"], config["causal"], tuple(config["grid"])
        self.ranks, self.weights, self.x, self.cotangent = config["ranks"], weights, x, cotangent

    def project(self, x: torch.Tensor, heads: slice = slice(None)) -> list[torch.Tensor]:
        projected = (x @ self.weights[name] for name in ("w_q", "w_k", "w_v"))
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2)[:, heads] for y in projected]

    def tokens(self, layout: str, split: str, group) -> dict[str, torch.Tensor]:
        """A layout that splits tokens: the result of this rank, and the result of all ranks together."""
        peers = Peers(group)
        sharding = Sharding.make(self.x.shape[1], peers.size, split)
        x = shard_tensor(self.x, sharding, peers.rank).requires_grad_()
        query, key, value = self.project(x)
        states, logsumexp = distributed_attention(
            *(query, key, value),
            layout=layout,
            split=split,
            causal=self.causal,
            group=group,
            return_logsumexp=True,
            grid=self.grid if layout == "grid" else None,
        )
        output = states.transpose(1, 2).flatten(2) @ self.weights["w_o"]
        (output * shard_tensor(self.cotangent, sharding, peers.rank)).sum().backward()
        held = {"out": states, "lse": logsumexp, "tokens": sharding.indices(peers.rank)}
        if layout == "key":
            held = self.partial("key", split, peers.rank, peers.size) | {"tokens": held["tokens"]}
        elif layout == "grid":
            held = self.partial("grid", split, peers.rank, peers.size)
        return {f"{layout}.{split}.rank{peers.rank}.{name}": array for name, array in held.items()} | {
            f"output@{layout}.{split}": unshard_tensor(output, sharding, peers),
            f"head_outputs@{layout}.{split}": unshard_tensor(states, sharding, peers, dim=2),
            f"grad_x@{layout}.{split}": unshard_tensor(x.grad, sharding, peers),
        }

    def partial(self, layout: str, split: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
        length = self.x.shape[1]
        queries, keys = layout_spans(layout, length, ranks, split, self.grid)[rank]
        tokens, seen = (torch.cat([torch.arange(a, b) for a, b in spans]) for spans in (queries, keys))
        query, key, value = self.project(self.x)
        out, lse = partial_attention(
            *(query[:, :, tokens], key[:, :, seen], value[:, :, seen]),
            *(Sharding.make(length, ranks, split), queries, keys, self.causal),
        )
        return {"out": out, "lse": lse, "tokens": tokens, "keys": seen}

    def by_heads(self, split: str, group) -> dict[str, torch.Tensor]:
        peers = Peers(group)
        start, stop = head_spans(self.heads, peers.size)[peers.rank]
        x = self.x.clone().requires_grad_()
        states = distributed_attention(
            *self.project(x, slice(start, stop)), layout="head", causal=self.causal, group=group
        )
        projection = nn.Linear(*self.weights["w_o"].shape, bias=False, dtype=x.dtype)
        projection.weight.data = self.weights["w_o"].T
        output, contribution = project_heads(states, projection, peers)
        (output * self.cotangent).sum().backward()
        gathered = peers.exchange(
            [states] * peers.size, [(len(x), b - a, *states.shape[2:]) for a, b in head_spans(self.heads, peers.size)]
        )
        prefix = f"head.{split}.rank{peers.rank}"
        return {
            f"{prefix}.heads": torch.arange(start, stop),
            f"{prefix}.partial_output": contribution,
            f"output@head.{split}": output,
            f"head_outputs@head.{split}": torch.cat(gathered, 1),
            f"grad_x@head.{split}": peers.all_reduce(x.grad.clone()),
        }


def _process(rank: int, folder: str, size: int, layouts: list[tuple[str, str]], arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    attention = _Attention(*arguments)
    blocks = attention.grid[0] * attention.grid[1]
    groups = {ranks: distributed.new_group(list(range(ranks))) for ranks in sorted({attention.ranks, blocks})}
    found = {}
    for layout, split in layouts:
        ranks = blocks if layout == "grid" else attention.ranks
        if rank < ranks:
            compute = attention.by_heads if layout == "head" else attention.tokens
            names = (split,) if layout == "head" else (layout, split)
            found |= compute(*names, groups[ranks])
    torch.save({name: array.detach().clone() for name, array in found.items()}, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _distributed(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    arguments = (config, case.weights, case.input("x"), case.input("cotangent"))
    layouts = sorted({match.group(1, 2) for name in case.arrays if (match := _NAME.fullmatch(name))})
    size = max(config["ranks"], config["grid"][0] * config["grid"][1])
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(
            _process, args=(folder, size, [*layouts, ("ulysses", "contiguous")], arguments), nprocs=size
        )
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(size)]
    return {name: array for arrays in found for name, array in arrays.items()}


def _mixers(case: Case) -> dict[str, torch.Tensor]:
    x = case.input("x")
    batch = x if x.ndim == 3 else x[None]
    found = {}
    for name in MIXERS:
        if name in case.expected:
            mixer = from_official("unified_long_sequence", case.weights, config={**case.config, "mixer": name})
            mixed = mixer(batch)
            found[name] = mixed if x.ndim == 3 else mixed[0]
    return found


ENTRIES = {
    "exact distributed multi-head attention": _distributed,
    "token-mixing template instances": _mixers,
}


def run(case: Case) -> dict[str, torch.Tensor]:
    return next(function for entry, function in ENTRIES.items() if case.entry.startswith(entry))(case)
