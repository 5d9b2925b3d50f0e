"""Remapping from the attention layout to equal numbers of tokens per rank, for linear layers (arXiv 2509.21841)."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..pieces import pieces


@dataclass(frozen=True)
class Remap:
    """The tokens that move to another rank.

    Attributes:
        tokens: tokens of each rank in the attention layout.
        target: tokens of each rank in the balanced layout.
        moves: `(from, to, tokens)`.
        gpus_per_node: number of GPUs per node, to distinguish moves within a node from moves across nodes.
    """

    tokens: tuple[int, ...]
    target: tuple[int, ...]
    moves: tuple[tuple[int, int, int], ...]
    gpus_per_node: int

    def crosses_nodes(self, source: int, destination: int) -> bool:
        return source // self.gpus_per_node != destination // self.gpus_per_node

    def cost(self, intra: float = 1.0, inter: float = 6.0) -> float:
        """Sum over the moved tokens of the cost per token, within a node or across nodes."""
        return float(sum(count * (inter if self.crosses_nodes(a, b) else intra) for a, b, count in self.moves))


def plan_remap(tokens: Sequence[int], gpus_per_node: int) -> Remap:
    """Balance tokens at minimal cost: first from surplus to deficit inside each node, then across nodes.

    This greedy transport is optimal if moves across nodes cost more than moves within a node.

    Args:
        tokens: of each rank.
        gpus_per_node: ranks of a node.
    """
    target = pieces(sum(tokens), len(tokens))
    surplus = [max(0, have - want) for have, want in zip(tokens, target, strict=True)]
    deficit = [max(0, want - have) for have, want in zip(tokens, target, strict=True)]
    moves = []
    for across in (False, True):
        for source in range(len(tokens)):
            for destination in range(len(tokens)):
                if surplus[source] == 0:
                    break
                if not across and source // gpus_per_node != destination // gpus_per_node:
                    continue
                count = min(surplus[source], deficit[destination])
                if count:
                    surplus[source] -= count
                    deficit[destination] -= count
                    moves.append((source, destination, count))
    return Remap(tuple(tokens), tuple(target), tuple(moves), gpus_per_node)
