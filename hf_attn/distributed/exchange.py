"""Messages between the ranks of a group, with a time limit, a byte count, and informative errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed


class LostRankError(RuntimeError):
    """Another rank has ended, hangs, or sent something unexpected."""


@dataclass
class SentBytes:
    """Bytes that this rank has sent to other ranks."""

    total: int = 0


_counters: list[SentBytes] = []


@contextmanager
def count_sent_bytes() -> Iterator[SentBytes]:
    """Context that counts the bytes that this rank sends for distributed attention."""
    counter = SentBytes()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(tensors: Sequence[torch.Tensor]) -> None:
    for counter in _counters:
        counter.total += sum(tensor.nbytes for tensor in tensors)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes, because a backend may not support its dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Peers:
    """The ranks that share a sequence.

    Args:
        group: of processes; all by default.
        timeout: seconds to wait for other ranks in one exchange; by default the timeout of the group.

    Raises:
        RuntimeError: if there is no process group.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None, timeout: float | None = None):
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "There is no process group. Start the script with `torchrun --nproc_per_node 2 script.py` and call "
                '`torch.distributed.init_process_group("gloo")` ("nccl" on GPUs) first; a single process is enough to try it.'
            )
        self.group = distributed.group.WORLD if group is None else group
        if self.group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError("This process is not a member of the given process group.")
        self.timeout = None if timeout is None else timedelta(seconds=timeout)
        self.rank = distributed.get_rank(self.group)
        self.size = distributed.get_world_size(self.group)

    @classmethod
    def alone(cls) -> "Peers":
        """A single process without a group."""
        peers = cls.__new__(cls)
        peers.group, peers.timeout, peers.rank, peers.size = None, None, 0, 1
        return peers

    @contextmanager
    def _watched(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"Rank {self.rank} of {self.size} could not finish the {doing}: another rank has ended, hangs, or has "
                "different inputs. See the log of that rank for its own error. The time limit is `timeout`, or the "
                f"timeout of the process group. ({error})"
            ) from error

    def _wait(self, work) -> None:
        if work is not None:
            _ = work.wait() if self.timeout is None else work.wait(self.timeout)

    @property
    def device(self) -> torch.device | str:
        """Device of the tensors that the group can send."""
        nccl = self.size > 1 and distributed.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def exchange(self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Send a tensor to each rank, and receive one of known shape from each rank.

        Args:
            parts: one tensor per rank, all of one dtype.
            shapes: shapes of the tensors received from each rank.
        """
        _count([part for rank, part in enumerate(parts) if rank != self.rank])
        dtype, device = parts[0].dtype, parts[0].device
        if self.size == 1:
            return [parts[0].reshape(tuple(shapes[0]))]
        sent = [_bytes(part) for part in parts]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        with self._watched("exchange with all ranks"):
            self._wait(
                distributed.all_to_all_single(
                    received, torch.cat(sent), sizes, [len(x) for x in sent], group=self.group, async_op=True
                )
            )
        pieces = received.split(sizes)
        # The pieces of one buffer may start anywhere, but a view as another dtype has to be aligned.
        return [piece.clone().view(dtype).view(tuple(shape)) for piece, shape in zip(pieces, shapes, strict=True)]

    def start(self, messages: Sequence["Message"]) -> "Pending":
        """Start sending and receiving between pairs of ranks; both ranks of a pair list their messages in the same order."""
        operations = []
        received = []
        for message in messages:
            if message.send is not None and message.send.numel():
                _count([message.send])
                peer = distributed.get_global_rank(self.group, message.to)
                operations.append(distributed.P2POp(distributed.isend, _bytes(message.send), peer, self.group))
            if message.shape is None:
                received.append(None)
                continue
            buffer = torch.empty(message.shape, dtype=message.dtype, device=message.device)
            received.append(buffer)
            if buffer.numel():
                peer = distributed.get_global_rank(self.group, message.source)
                flat = buffer.view(-1).view(torch.uint8)
                operations.append(distributed.P2POp(distributed.irecv, flat, peer, self.group))
        with self._watched("exchange in a ring"):
            works = distributed.batch_isend_irecv(operations) if operations else []
        return Pending(self, works, operations, received)

    def all_gather_integers(self, values: Sequence[int]) -> list[list[int]]:
        """Gather the integers of all ranks, each of which has the same number of them."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        with self._watched("comparison of inputs"):
            self._wait(distributed.all_gather(gathered, own, group=self.group, async_op=True))
        return [x.tolist() for x in gathered]

    def all_reduce(self, tensor: torch.Tensor, operation=distributed.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place over the ranks; half-precision tensors are reduced in float32."""
        if self.size == 1:
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
        wide = wide.contiguous()
        with self._watched("reduction"):
            self._wait(distributed.all_reduce(wide, operation, group=self.group, async_op=True))
        return tensor.copy_(wide) if wide is not tensor else tensor

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite a tensor with that of one rank of the group."""
        if self.size > 1:
            peer = distributed.get_global_rank(self.group, source)
            with self._watched("broadcast"):
                self._wait(distributed.broadcast(tensor, peer, group=self.group, async_op=True))
        return tensor

    def check_equal(self, facts: dict[str, int]) -> None:
        """Raise on all ranks unless they agree on every fact.

        Raises:
            ValueError: names the facts that differ and the values of the ranks.
        """
        gathered = self.all_gather_integers(list(facts.values()))
        different = [
            f"{name} ({', '.join(f'rank {rank}: {values[i]}' for rank, values in enumerate(gathered))})"
            for i, name in enumerate(facts)
            if len({values[i] for values in gathered}) > 1
        ]
        if different:
            raise ValueError(
                f"The ranks do not agree on {'; '.join(different)}. All ranks need the same batch and the same arguments."
            )


@dataclass(frozen=True)
class Message:
    """A message to one rank and a message from another; ranks are those of the group.

    Attributes:
        to: rank that gets `send`.
        send: tensor, or None.
        source: rank from which a tensor is received.
        shape: shape of the received tensor, or None.
        dtype: dtype of the received tensor.
        device: device of the received tensor.
    """

    to: int
    send: torch.Tensor | None
    source: int
    shape: Sequence[int] | None
    dtype: torch.dtype
    device: torch.device


class Pending:
    """Pending messages."""

    def __init__(self, peers: Peers, works, operations, received: list[torch.Tensor | None]):
        # The operations keep a reference to the sent tensors.
        self._peers, self._works, self._operations, self._received = peers, works, operations, received

    def wait(self) -> list[torch.Tensor | None]:
        """Wait for the messages, and return the received tensor of each."""
        with self._peers._watched("exchange in a ring"):
            for work in self._works:
                self._peers._wait(work)
        self._works, self._operations = [], []
        return self._received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, peers: Peers, shapes, *parts):
        ctx.peers, ctx.shapes = peers, [part.shape for part in parts]
        return tuple(peers.exchange(parts, shapes))

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ctx.peers.exchange(gradients, ctx.shapes)


def exchange(peers: Peers, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """Differentiable [`Peers.exchange`]: the gradients of received tensors are sent back."""
    if peers.size == 1:
        return tuple(parts)
    return _Exchange.apply(peers, shapes, *parts)
