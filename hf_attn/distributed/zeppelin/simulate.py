"""Predicted time of a training step with Zeppelin and with three other placements of a batch of uneven sequences.

Predictions under the constants of [`~hf_attn.distributed.zeppelin.cost.Hardware`], not measurements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost import PASSES, Hardware, ModelShape, Pass, ring_seconds
from .partition import Plan
from .remap import Remap, plan_remap


#: names of the methods, in the order in which they are reported
METHODS = ("zeppelin", "zeppelin_no_routing", "zeppelin_no_remap", "te_cp", "llama_cp", "hybrid_dp")


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer in one pass: attention, linear layers, remapping."""

    attention: float
    linear: float
    remap: float

    @property
    def total(self) -> float:
        return self.attention + self.linear + self.remap


def simulate(plan: Plan, model: ModelShape, hardware: Hardware) -> dict[str, float]:
    """Predicted seconds of a step (all layers, forward and backward pass) by each of [`METHODS`].

    `te_cp` splits every sequence evenly over all ranks in one ring; `llama_cp` gathers keys and values instead; `hybrid_dp` gives
    sequences groups of a power of two of ranks, in as many micro-batches as the capacity requires.
    """
    micro_batches = hybrid_micro_batches(plan.lengths, plan.num_ranks, plan.capacity)

    def step(layer_seconds) -> float:
        return model.layers * sum(layer_seconds(step) for step in PASSES)

    return {
        "zeppelin": step(lambda p: zeppelin_layer(plan, model, hardware, p).total),
        "zeppelin_no_routing": step(lambda p: zeppelin_layer(plan, model, hardware, p, routing=False).total),
        "zeppelin_no_remap": step(lambda p: zeppelin_layer(plan, model, hardware, p, remapping=False).total),
        "te_cp": step(lambda p: _even_ring(plan, model, hardware, p)),
        "llama_cp": step(lambda p: _gathered(plan, model, hardware, p)),
        "hybrid_dp": step(lambda p: sum(_micro_batch(m, plan, model, hardware, p) for m in micro_batches)),
    }


def zeppelin_layer(
    plan: Plan, model: ModelShape, hardware: Hardware, step: Pass, routing: bool = True, remapping: bool = True
) -> LayerTime:
    """Seconds of a layer in Zeppelin.

    Args:
        plan: of the batch.
        model: sizes.
        hardware: constants.
        step: forward or backward pass.
        routing: spread transfers across nodes over the network cards.
        remapping: balance the tokens for the linear layers.
    """
    remap = plan_remap(plan.tokens_per_rank, plan.gpus_per_node)
    tokens = max(remap.target) if remapping else max(remap.tokens)
    return LayerTime(
        attention=max(attention_seconds_per_rank(plan, model, hardware, step, routing)),
        linear=step.linear * tokens * model.linear_flops / hardware.flops_linear,
        remap=_remap_seconds(remap, model, hardware) if remapping else 0.0,
    )


def attention_seconds_per_rank(
    plan: Plan, model: ModelShape, hardware: Hardware, step: Pass, routing: bool = True
) -> list[float]:
    """Total seconds of the rings of each rank."""
    seconds = [0.0] * plan.num_ranks
    for length, zone, shares in zip(plan.lengths, plan.zones, plan.shares, strict=True):
        time = ring_seconds(model, hardware, step, length, len(shares), zone == "inter", routing)
        for rank, _ in shares:
            seconds[rank] += time
    return seconds


def _remap_seconds(remap: Remap, model: ModelShape, hardware: Hardware) -> float:
    """Seconds to the balanced layout and back, limited by the busier direction (send or receive) of each rank."""
    sends, receives = [0.0] * len(remap.tokens), [0.0] * len(remap.tokens)
    for source, destination, count in remap.moves:
        bandwidth = hardware.bw_nic if remap.crosses_nodes(source, destination) else hardware.bw_intra
        seconds = count * model.hidden * model.bytes / bandwidth
        sends[source] += seconds
        receives[destination] += seconds
    return 2 * max(*sends, *receives)


def _linear(tokens: float, model: ModelShape, hardware: Hardware, step: Pass) -> float:
    return step.linear * tokens * model.linear_flops / hardware.flops_linear


def _even_ring(plan: Plan, model: ModelShape, hardware: Hardware, step: Pass) -> float:
    ranks, tokens = plan.num_ranks, sum(plan.lengths)
    flops = sum(model.attention_flops(length) for length in plan.lengths)
    compute = step.attention * flops / (ranks**2 * hardware.flops_attn)
    send = 0.0
    if ranks > 1:
        send = step.communication * hardware.transfer(model.kv_bytes(tokens / ranks), inter=plan.nodes > 1)
    return compute + (ranks - 1) * max(compute, send) + _linear(tokens / ranks, model, hardware, step)


def _gathered(plan: Plan, model: ModelShape, hardware: Hardware, step: Pass) -> float:
    nodes, gpus, tokens = plan.nodes, plan.gpus_per_node, sum(plan.lengths)
    flops = sum(model.attention_flops(length) for length in plan.lengths)
    seconds = step.attention * flops / (plan.num_ranks * hardware.flops_attn)
    size = model.kv_bytes(tokens)
    if nodes > 1:
        across = hardware.lat_inter * (nodes - 1) + size * (nodes - 1) / (nodes * hardware.nics * hardware.bw_nic)
        seconds += step.communication * across
    if gpus > 1:
        inside = hardware.lat_intra * (gpus - 1) + size * (gpus - 1) / (gpus * hardware.bw_intra)
        seconds += step.communication * inside
    return seconds + _linear(tokens / plan.num_ranks, model, hardware, step)


def hybrid_micro_batches(lengths: Sequence[int], ranks: int, capacity: int) -> list[list[tuple[int, int, int]]]:
    """Micro-batches of `(length, first rank, ranks)`: groups of a power of two of ranks, longest sequence first."""
    micro_batches: list[tuple[list, list[int], list[float]]] = []
    for length in sorted(lengths, reverse=True):
        size = 1
        while size * capacity < length and size < ranks:
            size *= 2
        size = min(size, ranks)
        tokens = math.ceil(length / size)
        for micro_batch in micro_batches:
            _, load, quad = micro_batch
            starts = range(0, ranks - size + 1, size)
            room = [s for s in starts if max(load[s : s + size]) + tokens <= capacity]
            if room:
                start = min(room, key=lambda s: (max(quad[s : s + size]), s))
                break
        else:
            micro_batch, start = ([], [0] * ranks, [0.0] * ranks), 0
            micro_batches.append(micro_batch)
        groups, load, quad = micro_batch
        groups.append((length, start, size))
        for rank in range(start, start + size):
            load[rank] += tokens
            quad[rank] += length**2 / size
    return [groups for groups, _, _ in micro_batches]


def _micro_batch(groups, plan: Plan, model: ModelShape, hardware: Hardware, step: Pass) -> float:
    seconds = [0.0] * plan.num_ranks
    for length, start, size in groups:
        inter = start // plan.gpus_per_node != (start + size - 1) // plan.gpus_per_node
        time = ring_seconds(model, hardware, step, length, size, inter, routing=False)
        time += _linear(length / size, model, hardware, step)
        for rank in range(start, start + size):
            seconds[rank] += time
    return max(seconds)
