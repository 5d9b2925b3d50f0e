"""Batches of uneven documents for :func:`~hf_attn.distributed.context.sequence_parallel` and the Trainer mixin."""

import itertools
from dataclasses import dataclass

from ..context import SequenceParallel
from ..exchange import Peers
from ..sharding import Sharding
from .engine import ZeppelinSchedule
from .partition import Plan, PlanError, default_capacity, even_partition, partition


@dataclass(frozen=True)
class Cluster:
    """What batches are planned for.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: ranks of a node.
        capacity: maximum number of tokens per rank; by default the need of the batch plus 15%.
    """

    nodes: int
    gpus_per_node: int
    capacity: int | None = None

    def plan(self, lengths) -> Plan:
        """Partition a batch.

        Raises:
            PlanError: if it has more tokens than the cluster takes, or none.
        """
        capacity = self.capacity
        if capacity is None:
            capacity = default_capacity(lengths, self.nodes * self.gpus_per_node)
        return partition(lengths, self.nodes, self.gpus_per_node, capacity)

    @classmethod
    def of(cls, ranks: int, nodes: int = 1, capacity: int | None = None) -> "Cluster":
        """The ranks of a group on some nodes.

        Raises:
            PlanError: if the nodes would have different numbers of ranks.
        """
        if nodes < 1 or ranks % nodes:
            raise PlanError(f"{ranks} ranks cannot be distributed evenly over {nodes} nodes.")
        return cls(nodes, ranks // nodes, capacity)


class EvenCluster(Cluster):
    """Shares every document among all ranks, as even context parallelism does; to compare with."""

    def plan(self, lengths) -> Plan:
        return even_partition(lengths, self.nodes, self.gpus_per_node)


class ZeppelinParallel(SequenceParallel):
    """Sequence parallelism in which each batch has a plan of its own: balanced tokens, and attention in the plan's rings.

    Attributes:
        cluster: what batches are planned for.
        plan: of the batch that was sharded last.
    """

    def __init__(self, peers: Peers, cluster: Cluster):
        super().__init__(peers, "zeppelin", "contiguous")
        self.cluster = cluster
        self.plan: Plan | None = None

    def make_sharding(self, length, cu_seqlens, mask) -> Sharding:
        if mask is not None:
            raise ValueError("Zeppelin takes packed batches without padding: collate them with ZeppelinCollator.")
        bounds = cu_seqlens or (0, length)
        self.plan = self.cluster.plan([b - a for a, b in itertools.pairwise(bounds)])
        self.schedule = ZeppelinSchedule(self.plan, self.peers)
        return self.schedule.balanced

    def set_sharding(self, sharding: Sharding) -> None:
        self.sharding = sharding
