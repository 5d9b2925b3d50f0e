"""Combiner attention (arXiv 2107.05768): every token attends to distant tokens through summaries of spans.

    A_i = sum over direct j of p(j | i) v_j + sum over spans S of p(S | i) v_S,   v_S = sum over j in S of p(j | S) v_j

The direct tokens and the spans of `i` share one softmax, of `q_i . k_j` and `q_i . k_S`. Inside of a span the
weights are a softmax of `q_S . k_j`, the same for every query that attends to it; `q_S` and `k_S` are maxima over the span.
"""

import functools

import torch
from torch import nn

from ..kernels.combiner.call import (
    CombinerCall,
    Sequences,
    by_sequences,
    check_eager,
    check_torch,
    default_segment_length,
)
from ..kernels.combiner.grid import attend_grid
from ..kernels.combiner.logsparse import attend_logsparse
from ..kernels.combiner.plan import KINDS, ROWMAJOR, make_plan
from ..kernels.combiner.segments import attend_fixed
from ..kernels.combiner.softmax import masked_softmax
from .dispatch import Implementation
from .interface import Mechanism


def pool_spans(states: torch.Tensor, members: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool the tokens of spans.

    Args:
        states: `(batch, heads, length, head_dim)`.
        members: boolean `(batch or 1, 1, spans, length)`.
        pool: `"max"` (of equal values the first gets the gradient), `"mean"` or `"sum"`.

    Returns:
        `(batch, heads, spans, head_dim)`; zeros for an empty span.
    """
    if pool != "max":
        total = members.to(states.dtype) @ states
        return total / members.sum(-1, keepdim=True).clamp(min=1) if pool == "mean" else total
    lowest = torch.finfo(states.dtype).min
    # A few spans at a time: together they would be (spans, length, head_dim).
    pooled = [
        torch.where(some[..., None], states[:, :, None], lowest).max(-2).values for some in members.split(64, dim=2)
    ]
    pooled = torch.cat(pooled, dim=2) if pooled else states[:, :, :0]
    return torch.where(members.any(-1)[..., None], pooled, 0.0)


def combiner_probabilities(
    call: CombinerCall, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The probabilities of Combiner attention among the tokens of sequences.

    Args:
        call: as many heads of keys as of queries, and a sequence in each row.
        valid: boolean `(batch, length)`, false where a sequence is over.

    Returns:
        Of queries over direct tokens `(batch, heads, length, length)` and over spans `(batch, heads, length, spans)`,
        which sum to 1 together; and inside of spans `(batch, heads, spans, length)`.
    """
    query, key = call.query, call.key
    length = query.shape[2]
    plan = make_plan(
        call.kind, length, call.segment_length, call.is_causal, call.own_segment_summary, device=query.device
    )
    direct, members, uses = plan.direct[None, None], plan.members[None, None], plan.uses[None, None]
    if valid is not None:
        direct, members = direct & valid[:, None, None], members & valid[:, None, None]
    uses = uses & members.any(-1)[..., None, :]

    if plan.asking is None:
        span_query, span_key = (pool_spans(states, members, call.pool) for states in (query, key))
    else:
        asking = plan.asking.expand(query.shape[0], -1)
        if valid is not None:
            asking = torch.minimum(asking, (valid.sum(1, keepdim=True) - 1).clamp(min=0))
        span_query = query.take_along_dim(asking[:, None, :, None], dim=2)
    inside = masked_softmax(span_query @ key.transpose(-1, -2) * call.scaling, members)
    if plan.asking is not None:
        row_output = inside.to(query.dtype) @ call.value
        span_key = call.row_key(row_output, call.row_input.take_along_dim(asking[..., None], dim=1))

    logits = torch.cat((query @ key.transpose(-1, -2), query @ span_key.transpose(-1, -2)), dim=-1) * call.scaling
    joint = masked_softmax(logits, torch.cat((direct, uses), dim=-1))
    return joint[..., :length], joint[..., length:], inside


def combiner_attention_eager(call: CombinerCall, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Combiner attention as the equations read; the specification of the other implementations.

    Dropout is where the official code has it: on the weights inside of spans, on those of direct tokens too for plans of
    rows and columns, and nowhere in the mixture.

    Returns:
        Output `(batch, heads, length, head_dim)`, and the weight of each token `(batch, heads, length, length)`.
    """
    batch, length = call.query.shape[0], call.query.shape[2]
    call = by_sequences(call, sequences)
    direct, spans, inside = combiner_probabilities(call, sequences.valid)
    if call.kind != "mixture":
        inside = nn.functional.dropout(inside, call.dropout)
    if call.kind in ("vertical", "horizontal", ROWMAJOR):
        direct = nn.functional.dropout(direct, call.dropout)
    weights = (direct + spans @ inside).to(call.query.dtype)
    output = sequences.scatter(weights @ call.value, batch, length)
    if sequences.index is not None:
        weights = _scattered_weights(weights, sequences, batch, length)
    return output, weights


def _scattered_weights(weights: torch.Tensor, sequences: Sequences, batch: int, length: int) -> torch.Tensor:
    """Weights between the tokens of sequences as weights between those of rows."""
    places = sequences.index % length
    wide = weights.new_zeros(*weights.shape[:3], length)
    index = places[:, None, None].expand_as(weights)
    visible = sequences.valid[:, None, None].to(weights.dtype)
    wide = wide.scatter_add(3, index, weights * visible)
    return sequences.scatter(wide, batch, length)


def _eager(call: CombinerCall, sequences: Sequences | None):
    if call.state is None:
        return combiner_attention_eager(call, sequences)
    return call.state.attend(call, sequences, combiner_attention_eager)


def combiner_attention_torch(call: CombinerCall, sequences: Sequences) -> tuple[torch.Tensor, None]:
    """Combiner attention with memory below the square of the length."""
    batch, length = call.query.shape[0], call.query.shape[2]
    call = by_sequences(call, sequences)
    valid = None if sequences.is_causal else sequences.valid
    if call.kind == "fixed":
        output = attend_fixed(call, valid)
    elif call.kind == "logsparse":
        output = attend_logsparse(call)
    else:
        output = attend_grid(call)
    return sequences.scatter(output, batch, length), None


def _torch(call: CombinerCall, sequences: Sequences | None):
    if call.state is None:
        return combiner_attention_torch(call, sequences)
    return call.state.attend(call, sequences, combiner_attention_torch)


class CombinerMechanism(Mechanism):
    """A plan of Combiner; its calls continue the state of their keys."""

    def make_call(self, module, name, query, key, value, *args, is_causal=None, **kwargs) -> CombinerCall:
        call = super().make_call(module, name, query, key, value, *args, is_causal=is_causal, **kwargs)
        call.state = getattr(key, "combiner_state", None)
        if query.shape[2] == key.shape[2] == 1 and call.attention_mask is None:
            # The first token of a sequence that goes on, for which causal and not are the same but for the cache.
            call.is_causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
        return call


def segment_length_of(config) -> int | None:
    """The segment length for models of a configuration: its `combiner_segment_length`, else near the square root of its
    `max_position_embeddings`; `None` if it has neither."""
    length = getattr(config, "combiner_segment_length", None)
    if length is None and getattr(config, "max_position_embeddings", None) is not None:
        length = default_segment_length(config.max_position_embeddings)
    return length


def _arguments(module: nn.Module, kwargs: dict, kind: str) -> dict:
    config = module.config
    arguments = {
        "kind": kind,
        "segment_length": segment_length_of(config),
        "pool": getattr(config, "combiner_pool", "max"),
        "own_segment_summary": getattr(config, "own_segment_summary", False),
    }
    if kind == ROWMAJOR:
        if kwargs.get("row_key") is None:
            raise ValueError(
                f"The summaries of combiner_{ROWMAJOR} have weights, but {type(module).__name__} has none for them. "
                "Use CombinerForCausalLM or CombinerForMaskedLM, or another plan: "
                f"{', '.join(f'combiner_{other}' for other in KINDS)}."
            )
        arguments |= {"row_key": kwargs.pop("row_key"), "row_input": kwargs.pop("row_input")}
    return arguments


def _example(heads: int, kv_len: int, kind: str, segment_length: int) -> dict:
    fields = {"kind": kind, "segment_length": segment_length}
    if kind == ROWMAJOR:
        fields |= {"row_key": lambda output, row_input: output + 1, "row_input": torch.zeros(2, kv_len, 1)}
    return fields


def _mechanism(kind: str) -> CombinerMechanism:
    return CombinerMechanism(
        name=f"combiner_{kind}",
        implementations=(Implementation("torch", _torch, check_torch), Implementation("eager", _eager, check_eager)),
        call=CombinerCall,
        arguments=functools.partial(_arguments, kind=kind),
        examples={f"segments_of_{s}": functools.partial(_example, kind=kind, segment_length=s) for s in (4, 7)},
    )


#: kind -> its attention function
COMBINERS = {kind: _mechanism(kind) for kind in (*KINDS, ROWMAJOR)}
