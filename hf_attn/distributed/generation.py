"""Generation after a prompt that is split over ranks; each rank caches the keys and values of its own tokens."""

from typing import Any

import torch
from torch import distributed

from .blocks import Block
from .context import SequenceParallel, activated, layout_of
from .exchange import Peers
from .heads import local_attention
from .local import Accumulator
from .sharding import Sharding


#: arguments of `generate` that access the cache, or run the model on anything other than the prompt and single tokens
_REFUSED = (
    "assistant_model",
    "prefill_chunk_size",
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "past_key_values",
)


def distributed_generate(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    group: distributed.ProcessGroup | None = None,
    split: str = "zigzag",
    timeout: float | None = None,
    **generate_arguments: Any,
):
    """`model.generate` with the prompt split over ranks; every rank returns the result of a single process.

    The prompt is computed in the layout of the model's `attn_implementation`, and each rank caches the keys and values of its
    own tokens. A new token is computed on all ranks; each attends to its own keys, and the partial results are merged.

    Args:
        model: see [`~hf_attn.distributed.context.sequence_parallel`].
        input_ids: `(batch, length)`, the same on all ranks.
        attention_mask: `(batch, length)`, padding on the left.
        group: of processes; all by default.
        split: how the prompt is split.
        timeout: seconds to wait for other ranks.
        generate_arguments: arguments of `model.generate`. With sampling, the random numbers are those of rank 0.

    Raises:
        ValueError: for padding on the right, unsupported arguments of `generate`, or inputs that differ between ranks.
    """
    refused = [name for name in _REFUSED if generate_arguments.get(name) is not None]
    if refused:
        raise ValueError(f"Generation on several ranks does not support {', '.join(refused)}.")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("Prompts must be padded on the left: set tokenizer.padding_side = 'left'.")
    context = SequenceParallel(Peers(group, timeout), layout_of(model), split)
    if context.layout == "zeppelin":
        raise ValueError("Zeppelin plans training batches only: generate with distributed_ring or another layout.")
    context.peers.check_equal({"batch size": input_ids.shape[0], "length": input_ids.shape[1]})
    seed = torch.randint(2**31, (1,)) if context.peers.rank == 0 else torch.zeros(1, dtype=torch.int64)
    seed = int(context.peers.broadcast(seed.to(context.peers.device), 0))
    context.decoding = _Decoding(context)
    handles = [
        model.register_forward_pre_hook(context.decoding.before, with_kwargs=True),
        model.register_forward_hook(context.decoding.after),
    ]
    try:
        with activated(context), torch.random.fork_rng():
            torch.manual_seed(seed)
            return model.generate(input_ids=input_ids, attention_mask=attention_mask, **generate_arguments)
    finally:
        for handle in handles:
            handle.remove()


class _Decoding:
    """Hooks for the model calls of `generate`: first the prompt, then token by token."""

    def __init__(self, context: SequenceParallel):
        self.context, self.peers = context, context.peers
        self.started = False

    def before(self, model, arguments, inputs: dict) -> tuple[tuple, dict]:
        """Split the prompt; later calls have one token on all ranks."""
        inputs = dict(inputs)
        mask = inputs.pop("attention_mask", None)
        if self.started:
            return arguments, inputs
        if mask is not None and bool(mask.all()):
            mask = None
        tokens = inputs["input_ids"]
        self.context.set_sharding(Sharding.make(tokens.shape[1], self.peers.size, self.context.split, None, mask))
        local = self.context.local({**inputs, "input_ids": tokens}, self.context.sharding, tokens.shape[0])
        return arguments, local

    def after(self, model, arguments, output):
        """Send the scores of the last token from the rank that has it to all ranks."""
        sharding = self.context.sharding
        owner = 0
        if not self.started and not self.context.replicated:
            # In both splits, the last token of the sequence is the last one on its rank.
            last_spans = ((rank, a, b) for rank, spans in enumerate(sharding.spans) for a, b in spans)
            owner = next(rank for rank, a, b in last_spans if a < b == sharding.length)
        logits = output.logits
        last = logits[:, -1:] if logits.shape[1] else logits.new_zeros(logits.shape[0], 1, logits.shape[2])
        output.logits = self.peers.broadcast(last.contiguous(), owner)
        self.started = True
        return output

    def attend(self, query, key, value, scaling: float) -> torch.Tensor:
        """Attention of a new token to the prompt and to earlier new tokens; only rank 0 includes the latter."""
        if query.shape[2] != 1:
            raise ValueError(
                f"On several ranks tokens are generated one at a time, but the model was called with {query.shape[2]}."
            )
        sharding, rank = self.context.sharding, self.peers.rank
        if self.context.replicated:
            spans, own = [(0, sharding.length)], sharding.length
        else:
            spans, own = sharding.spans[rank], sharding.lengths[rank]
        count_new = self.context.replicated or rank == 0
        blocks = []
        for rows in sharding.rows(spans):
            seen = [Block(0, 1, run.offset, run.offset + run.stop - run.start, False) for run in rows.runs]
            new = [Block(0, 1, own, key.shape[2], False)] if count_new and key.shape[2] > own else []
            blocks.append((rows.span, seen + new))
        output, logsumexp = local_attention(query, key, value, blocks, scaling)
        if self.context.replicated or self.peers.size == 1:
            return output
        both = torch.cat([output.to(logsumexp.dtype), logsumexp[..., None]], -1)
        merged = Accumulator(query, value.shape[-1])
        for part in self.peers.exchange([both] * self.peers.size, [both.shape] * self.peers.size):
            merged.add((0, None), (0, 1), part[..., :-1], part[..., -1])
        return merged.result()[0]
