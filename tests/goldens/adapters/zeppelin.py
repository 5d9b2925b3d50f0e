"""Zeppelin: the partition of a batch, its remapping, and the predicted step times."""

import torch

from hf_attn.distributed.zeppelin.cost import PASSES, Hardware, ModelShape, crossover
from hf_attn.distributed.zeppelin.partition import ZONES, partition
from hf_attn.distributed.zeppelin.remap import plan_remap
from hf_attn.distributed.zeppelin.simulate import METHODS, simulate, zeppelin_layer

from ..case import Case


def run(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    nodes, gpus = config["nodes"], config["gpus_per_node"]
    model, hardware = ModelShape(**config["model"]), Hardware(**config["hardware"])
    lengths = case.input("lengths").tolist()
    plan = partition(lengths, nodes, gpus, config["capacity"])
    tokens = torch.zeros(len(lengths), plan.num_ranks, dtype=torch.int64)
    for i, shares in enumerate(plan.shares):
        for rank, count in shares:
            tokens[i, rank] = count
    remap = plan_remap(plan.tokens_per_rank, gpus)
    seconds = simulate(plan, model, hardware)
    layers = [zeppelin_layer(plan, model, hardware, step) for step in PASSES]
    none = float("nan")
    links = [
        crossover(model, hardware, gpus, inter=False) if gpus > 1 else none,
        crossover(model, hardware, plan.num_ranks, inter=True) if nodes > 1 else none,
    ]
    return {
        "plan_s1": torch.tensor([plan.inter_threshold]),
        "plan_s0": torch.tensor(plan.intra_thresholds),
        "plan_zone": torch.tensor([ZONES.index(zone) for zone in plan.zones]),
        "plan_tokens": tokens,
        "tokens_per_rank": torch.tensor(plan.tokens_per_rank),
        "remap_target": torch.tensor(remap.target),
        "remap_cost": torch.tensor([remap.cost()], dtype=torch.float64),
        "seconds": torch.tensor([seconds[method] for method in METHODS], dtype=torch.float64),
        "per_layer": torch.tensor([[x.attention, x.linear, x.remap] for x in layers], dtype=torch.float64),
        "crossover": torch.tensor(links, dtype=torch.float64),
    }
