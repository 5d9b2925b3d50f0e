"""Models of transformers on sequences that are split over ranks, with the loss and the gradients of a single process.

model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="distributed_ring")
with sequence_parallel(model):
    loss = model(**shard(batch)).loss
    loss.backward()
"""

import inspect
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import distributed, nn

from ..attention.interface import uses_attention
from .exchange import Peers
from .functional import LAYOUTS, Schedule
from .heads import replicated_head_attention
from .sharding import Sharding, shard_tensor, shift_labels, unshard_tensor


PREFIX = "distributed_"

#: configuration fields that change the attention to something other than softmax over all tokens, and their meaning
_OTHER_ATTENTION = {
    "attn_logit_softcapping": "soft-capped logits",
    "output_router_logits": "a router loss that is not a sum over tokens",
}


class SequenceParallel:
    """The state of [`sequence_parallel`].

    Attributes:
        peers: the ranks.
        layout: layout of attention.
        split: split of the tokens.
        grid: shape of the layout `"grid"`.
        sharding: sharding of the last batch.
        schedule: schedule of the last batch.
    """

    def __init__(self, peers: Peers, layout: str, split: str, grid: tuple[int, int] | None = None):
        self.peers, self.layout, self.split, self.grid = peers, layout, split, grid
        self.sharding: Sharding | None = None
        self.schedule: Any = None
        # Set by `distributed_generate`.
        self.decoding: Any = None

    @property
    def replicated(self) -> bool:
        """Whether every rank has all tokens."""
        return self.layout == "head"

    def set_sharding(self, sharding: Sharding) -> None:
        """Use the sharding of this batch for attention from now on."""
        self.sharding = sharding
        self.schedule = None if self.replicated else Schedule(self.peers, sharding, self.layout, self.split, self.grid)

    def attend(self, query, key, value, causal: bool, scaling: float) -> torch.Tensor:
        """Attention of a layer; for the arguments see [`~hf_attn.distributed.functional.distributed_attention`]."""
        if self.decoding is not None and self.decoding.started:
            return self.decoding.attend(query, key, value, scaling)
        if self.sharding is None:
            raise RuntimeError(
                "The model was called with a batch that was not sharded. Call it as `model(**shard(batch))`."
            )
        tokens = self.sharding.length if self.replicated else self.sharding.lengths[self.peers.rank]
        if query.shape[2] != tokens or key.shape[2] != tokens:
            raise ValueError(
                f"Attention has {query.shape[2]} queries and {key.shape[2]} keys, but rank {self.peers.rank} has "
                f"{tokens} tokens of the last sharded batch. To use a cache, call `distributed_generate`."
            )
        if self.replicated:
            return replicated_head_attention(query, key, value, self.peers, self.sharding, causal, scaling)
        return self.schedule.attend(query, key, value, causal, scaling)[0]

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See [`shard`]."""
        states = batch.get("input_ids", batch.get("inputs_embeds"))
        if states is None:
            raise ValueError("A batch needs `input_ids` or `inputs_embeds`.")
        rows, length = states.shape[:2]
        if rows == 0 or length == 0:
            raise ValueError(f"The batch is empty: {rows} rows of {length} tokens.")
        mask = batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) != (rows, length):
            raise ValueError(
                f"The attention mask must have the shape ({rows}, {length}), with 1 or True for tokens; got "
                f"{tuple(mask.shape)}."
            )
        cu_seqlens = _documents(batch, rows)
        if self.layout == "zeppelin" and rows > 1:
            raise ValueError(
                f"Zeppelin needs all documents of a batch in one row, got {rows} rows. Use ZeppelinCollator."
            )
        self.peers.check_equal(
            {
                "batch size": rows,
                "length": length,
                "tokens": zlib.crc32(states.detach().cpu().float().numpy().tobytes()),
                "attention mask": 0 if mask is None else 1 + zlib.crc32(mask.cpu().bool().numpy().tobytes()),
                "documents": zlib.crc32(repr(cu_seqlens).encode()),
            }
        )
        if mask is not None and bool(mask.all()):
            mask = None
        sharding = self.make_sharding(length, cu_seqlens, mask)
        self.set_sharding(sharding)
        return self.local(batch, sharding, rows)

    def make_sharding(self, length: int, cu_seqlens: tuple[int, ...] | None, mask: torch.Tensor | None) -> Sharding:
        """The sharding of a batch."""
        return Sharding.make(length, self.peers.size, self.split, cu_seqlens, mask)

    def local(self, batch: Mapping[str, Any], sharding: Sharding, rows: int) -> dict[str, Any]:
        """The part of a batch on this rank, with what is needed to compute the loss of all tokens."""
        if not self.replicated and 0 in sharding.lengths:
            raise ValueError(
                f"{sharding.length} tokens are too few for {self.peers.size} ranks: each rank needs at least one. Use "
                "fewer ranks, or a longer sequence."
            )
        whole = dict(batch)
        for name in ("attention_mask", *_DOCUMENT_BOUNDS, "max_length_q", "max_length_k", "sequence_lengths"):
            whole.pop(name, None)
        states = batch.get("input_ids", batch.get("inputs_embeds"))
        if whole.get("position_ids") is None:
            whole["position_ids"] = sharding.position_ids.to(states.device)
        labels = whole.pop("labels", None)
        if labels is not None:
            if whole.get("shift_labels") is None:
                whole["shift_labels"] = shift_labels(labels, sharding)
            # The model computes a loss if there are labels, and accepts labels that are already shifted.
            whole["labels"] = labels
            if whole.get("num_items_in_batch") is None:
                whole["num_items_in_batch"] = (whole["shift_labels"] != -100).sum()
        whole.setdefault("use_cache", False)
        local = {}
        for name, value in whole.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or self.replicated:
                local[name] = value
            elif value.dim() >= 2 and value.shape[0] in (1, rows) and value.shape[1] == sharding.length:
                local[name] = shard_tensor(value, sharding, self.peers.rank)
            else:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; tensors that are split over ranks must have the shape "
                    f"({rows}, {sharding.length}, ...). Leave it out, or pass it to the model in addition to "
                    "`**shard(batch)` if every rank needs the whole tensor."
                )
        return local


#: the active context; not thread-local, because the backward pass recomputes layers in other threads
_active: list[SequenceParallel] = []


def active() -> SequenceParallel:
    """The innermost [`sequence_parallel`].

    Raises:
        RuntimeError: outside of it.
    """
    if not _active:
        raise RuntimeError(
            'A model with attn_implementation="distributed_..." works only inside `with sequence_parallel(model):`, which defines '
            "how the ranks share a sequence. Call `backward()` inside it too."
        )
    return _active[-1]


@contextmanager
def activated(context: SequenceParallel) -> Iterator[SequenceParallel]:
    """Make a context the active one."""
    _active.append(context)
    try:
        yield context
    finally:
        _active.remove(context)


def shard(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch for this rank; all ranks pass the same batch, within [`sequence_parallel`].

    Args:
        batch: arguments of a causal model of transformers: `input_ids` (or `inputs_embeds`) `(batch, length, ...)`, and if
            there are any `labels`, `attention_mask` `(batch, length)` and `position_ids`. A packed batch is one row with
            `cu_seq_lens_q` or with positions that start again, as `DataCollatorWithFlattening` makes them.

    Returns:
        Arguments for the model: the tokens of this rank with their positions in the whole sequence, and labels that were
        shifted before they were split.

    Raises:
        ValueError: in all ranks, if they have different batches; if a tensor has another length.
    """
    return active().shard(batch)


def unshard(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Gather a tensor of the last batch in token order on every rank, such as `unshard(outputs.logits)`; without gradients."""
    context = active()
    return tensor if context.replicated else unshard_tensor(tensor, context.sharding, context.peers, dim)


_DOCUMENT_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def _documents(batch: Mapping[str, Any], rows: int) -> tuple[int, ...] | None:
    """Bounds of the documents of a packed batch."""
    bounds = batch.get("cu_seq_lens_q")
    if bounds is None and batch.get("attention_mask") is None and batch.get("position_ids") is not None:
        positions = batch["position_ids"]
        # Positions with three axes, as in multimodal models, do not define documents.
        if positions.dim() == 2 and bool((positions[:, 1:] - positions[:, :-1] != 1).any()):
            if not bool((positions == positions[:1]).all()):
                raise ValueError(
                    "The rows of the batch contain documents of different lengths. Pack them into one row, or leave "
                    "`position_ids` out and pad."
                )
            starts = (positions[0, 1:] - positions[0, :-1] != 1).nonzero().flatten() + 1
            bounds = [0, *starts.tolist(), positions.shape[1]]
    if bounds is None:
        return None
    if rows > 1 and batch.get("cu_seq_lens_q") is not None:
        raise ValueError(f"A packed batch must have one row, got {rows} rows with cu_seq_lens_q.")
    return tuple(int(bound) for bound in bounds)


class _GlobalLoss(torch.autograd.Function):
    """The sum over ranks of their shares of the loss; in the backward pass, the gradient of this rank's share.

    `scale` is the number of processes over which gradients are averaged afterwards, otherwise 1.
    """

    @staticmethod
    def forward(ctx, loss, peers: Peers, scale: int, on_backward):
        ctx.scale, ctx.on_backward = scale, on_backward
        return peers.all_reduce(loss.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        ctx.on_backward()
        return gradient * ctx.scale, None, None, None


def global_loss(loss: torch.Tensor, peers: Peers, scale: int = 1, on_backward=lambda: None) -> torch.Tensor:
    """The loss of all tokens from that of each rank's tokens, both divided by the total number of tokens."""
    return _GlobalLoss.apply(loss, peers, scale, on_backward)


class _GradientSum:
    """Sum gradients over ranks at the end of each backward pass, restricted to what this pass added to `.grad`."""

    def __init__(self, model: nn.Module, peers: Peers):
        self.peers, self.found, self.queued, self.closed = peers, {}, False, False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.handles = [p.register_hook(self._keep(i)) for i, p in enumerate(self.parameters)]

    def _keep(self, index: int):
        def keep(gradient):
            self.begin()
            self.found[index] = gradient
            # The sum is added at the end; earlier gradients are not changed.
            return torch.zeros_like(gradient)

        return keep

    def begin(self) -> None:
        """A backward pass has started."""
        if self.closed:
            raise RuntimeError("Call `loss.backward()` inside `with sequence_parallel(model):`.")
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.queued = False
        flags = [int(i in self.found) for i in range(len(self.parameters))]
        used = self.peers.all_reduce(torch.tensor(flags, device=self.peers.device)).tolist()
        for i, parameter in enumerate(self.parameters):
            if used[i]:
                gradient = self.found.pop(i, None)
                gradient = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
                gradient = self.peers.all_reduce(gradient)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def close(self) -> None:
        self.closed = True
        for handle in self.handles:
            handle.remove()


@contextmanager
def sequence_parallel(
    model: nn.Module,
    group: distributed.ProcessGroup | None = None,
    split: str = "zigzag",
    grid: tuple[int, int] | None = None,
    nodes: int = 1,
    capacity: int | None = None,
    timeout: float | None = None,
) -> Iterator[SequenceParallel]:
    """Context in which the ranks of a group share the tokens of each batch; all ranks must make the same calls.

    `model(**shard(batch))` has the loss of the whole batch in every rank, and `loss.backward()` leaves the gradients of one process
    in `.grad` of every rank. The layout of attention is in the name of the model's `attn_implementation`.

    Args:
        model: decoder of transformers, with or without PEFT adapters, with
            `attn_implementation="distributed_<layout>"`. It must not be wrapped in DDP, which would reduce the gradients again;
            for training with DDP use [`~hf_attn.distributed.trainer.SequenceParallelTrainerMixin`].
        group: of processes; all by default.
        split: `"zigzag"`, with equal work in causal attention, or `"contiguous"`.
        grid: query blocks and key blocks of the layout `"grid"`.
        nodes: number of nodes, for the plans of the layout `"zeppelin"`.
        capacity: maximum number of tokens per rank in those plans; by default 15% more than the batch needs.
        timeout: seconds to wait for other ranks; by default the process group's.

    Raises:
        ValueError: for a model that does not compute plain attention over all tokens, or does not use its
            `attn_implementation`.
        RuntimeError: if there is no process group.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "The model is wrapped in DistributedDataParallel, which averages gradients, but here they are summed. "
            "Pass the unwrapped model, or train with SequenceParallelTrainerMixin."
        )
    context = make_context(layout_of(model), Peers(group, timeout), split, grid, nodes, capacity)
    gradients = None if context.replicated else _GradientSum(model, context.peers)

    def complete(module, arguments, output):
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None or context.replicated:
            return output
        output["loss"] = global_loss(loss, context.peers, 1, gradients.begin)
        return output

    handle = model.register_forward_hook(complete)
    try:
        with activated(context):
            yield context
    finally:
        handle.remove()
        if gradients is not None:
            gradients.close()


def make_context(
    layout: str,
    peers: Peers,
    split: str = "zigzag",
    grid: tuple[int, int] | None = None,
    nodes: int = 1,
    capacity: int | None = None,
) -> SequenceParallel:
    """The state of [`sequence_parallel`]; see there for the arguments."""
    if layout != "zeppelin":
        return SequenceParallel(peers, layout, split, grid)
    parallel = import_module(f"{__package__}.zeppelin.parallel")
    return parallel.ZeppelinParallel(peers, parallel.Cluster.of(peers.size, nodes, capacity))


def layout_of(model: nn.Module) -> str:
    """The layout in the model's `attn_implementation`; checks that the model can be split over ranks.

    Raises:
        ValueError: if it is not a layout, or the model cannot be split over ranks.
    """
    config = model.config.get_text_config(decoder=True)
    name = config._attn_implementation or ""
    layouts = (*LAYOUTS, "zeppelin")
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in layouts:
        raise ValueError(
            f"{type(model).__name__} has attn_implementation={name!r}. Choose how ranks share a sequence, for instance with "
            f'`model.set_attn_implementation("distributed_ring")`. Available: {", ".join(PREFIX + x for x in layouts)}.'
        )
    uses_attention(model, name)
    reasons = [meaning for field, meaning in _OTHER_ATTENTION.items() if getattr(config, field, None)]
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        reasons.append(f"layers of type {', '.join(sorted(layer_types - {'full_attention'}))}")
    elif not layer_types and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reasons.append(f"a sliding window of {config.sliding_window}")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder and a decoder")
    if reasons:
        raise ValueError(
            f"{type(model).__name__} has {' and '.join(reasons)}, which {name} does not support: it computes softmax "
            "attention over all tokens. Use another model, or one process."
        )
    forward = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward.values()):
        raise ValueError(
            f"{type(model).__name__}.forward accepts no further arguments, so its loss cannot be given the labels and "
            "the number of tokens of all ranks. Use a model whose forward has **kwargs."
        )
    return name.removeprefix(PREFIX)
