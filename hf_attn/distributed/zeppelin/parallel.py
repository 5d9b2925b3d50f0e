"""Batches of uneven documents for [`~hf_attn.distributed.context.sequence_parallel`] and the Trainer mixin."""

import itertools
from dataclasses import dataclass

from ..context import SequenceParallel
from ..exchange import Peers
from ..sharding import Sharding
from .engine import ZeppelinSchedule
from .partition import Plan, PlanError, default_capacity, even_partition, partition


@dataclass(frozen=True)
class Cluster:
    """The cluster for which batches are planned.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: ranks of a node.
        capacity: maximum number of tokens per rank; by default 15% more than the batch needs.
    """

    nodes: int
    gpus_per_node: int
    capacity: int | None = None

    def plan(self, lengths) -> Plan:
        """Partition a batch.

        Raises:
            PlanError: if the batch has more tokens than the capacity of the cluster, or none.
        """
        capacity = self.capacity
        if capacity is None:
            capacity = default_capacity(lengths, self.nodes * self.gpus_per_node)
        return partition(lengths, self.nodes, self.gpus_per_node, capacity)

    @classmethod
    def of(cls, ranks: int, nodes: int = 1, capacity: int | None = None) -> "Cluster":
        """The cluster of a group's ranks on a number of nodes.

        Raises:
            PlanError: if the nodes would have different numbers of ranks.
        """
        if nodes < 1 or ranks % nodes:
            raise PlanError(f"{ranks} ranks cannot be distributed evenly over {nodes} nodes.")
        return cls(nodes, ranks // nodes, capacity)


class EvenCluster(Cluster):
    """Splits every document over all ranks, as plain context parallelism does; for comparison."""

    def plan(self, lengths) -> Plan:
        return even_partition(lengths, self.nodes, self.gpus_per_node)


class ZeppelinParallel(SequenceParallel):
    """Sequence parallelism with a plan for each batch: balanced tokens, and attention in the plan's rings.

    Attributes:
        cluster: cluster for which batches are planned.
        plan: plan of the last batch.
    """

    def __init__(self, peers: Peers, cluster: Cluster):
        super().__init__(peers, "zeppelin", "contiguous")
        self.cluster = cluster
        self.plan: Plan | None = None

    def make_sharding(self, length, cu_seqlens, mask) -> Sharding:
        if mask is not None:
            raise ValueError("Zeppelin needs packed batches without padding: use ZeppelinCollator.")
        bounds = cu_seqlens or (0, length)
        self.plan = self.cluster.plan([b - a for a, b in itertools.pairwise(bounds)])
        self.schedule = ZeppelinSchedule(self.plan, self.peers)
        return self.schedule.balanced

    def set_sharding(self, sharding: Sharding) -> None:
        self.sharding = sharding
