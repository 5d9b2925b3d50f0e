#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train a causal language model on sequences that several processes share, with exact attention.

SmolLM2-135M on English prose that is part of Python, 4,096 tokens on two processes:

    torchrun --nproc_per_node 2 scripts/train_long_context.py --block_size 4096 --max_steps 10 --output_dir out

Before training every process reports on the first batch: the loss beside that of one process, the bytes that attention sends
beside the formula of its layout, and the peak of memory of a step. `accelerate launch --config_file
scripts/configs/sequence_parallel_cpu.yaml scripts/train_long_context.py ...` is the same. See `--help` for the arguments of this script, and
transformers' `TrainingArguments` for the others. On GPUs the process group is NCCL's; that has not been run.
"""

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import (
    default_data_collator,
    set_seed,
)

from hf_attn.distributed.context import activated
from hf_attn.distributed.exchange import count_sent_bytes
from hf_attn.distributed.functional import LAYOUTS
from hf_attn.distributed.measure import forward_bytes
from hf_attn.distributed.trainer import SequenceParallelTrainerMixin
from hf_attn.examples.assets import read_texts, token_blocks
from hf_attn.examples.decoder_training import DecoderArguments, SharedTrainingArguments, load_decoder, train_and_save
from hf_attn.hub import HubTrainerMixin
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import run_script, training_folder


NAME = "train_long_context.py"
stop = partial(command_line.stop, NAME)


@dataclass
class LongContextArguments(DecoderArguments):
    """What to train, on what, and how the processes share it."""

    layout: str = field(default="ring", metadata={"help": f"Layout of distributed attention: {', '.join(LAYOUTS)}."})
    split: str = field(
        default="zigzag", metadata={"help": "Split of the tokens over processes: zigzag or contiguous."}
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens per sequence, over all processes."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on."})


@dataclass
class ScriptTrainingArguments(SharedTrainingArguments):
    """transformers' arguments with other defaults."""

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences per step, over all processes."})


class Trainer(SequenceParallelTrainerMixin, HubTrainerMixin, transformers.Trainer):
    """All processes share the tokens of every batch."""


def peak_memory(function) -> tuple[float, object]:
    """MiB by which this process grows at most while a function runs (Linux), and what it returns."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan, function()

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    result = function()
    return (read("VmHWM") - before) / 1024, result


def one_process_loss(model, batch: dict[str, torch.Tensor], implementation: str) -> float:
    """The loss of the same weights with plain attention, without anybody's help."""
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return model(**batch, use_cache=False).loss.item()
    finally:
        model.set_attn_implementation(implementation)


def report(trainer: Trainer, batch: dict[str, torch.Tensor], implementation: str) -> dict[str, float]:
    """Loss, bytes and memory of the first batch; printed by rank 0."""
    model, context = trainer.model, trainer.sequence_context
    peers, config = context.peers, model.config
    model.eval()
    with activated(context), torch.no_grad(), count_sent_bytes() as sent:
        loss = trainer.compute_loss(model, dict(batch)).item()
    expected_bytes = math.nan
    if not context.replicated:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = (
            len(batch["input_ids"]),
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            model.dtype,
        )
        expected_bytes = config.num_hidden_layers * forward_bytes(context.schedule, *sizes)

    def step() -> None:
        with activated(context):
            trainer.compute_loss(model, dict(batch)).backward()

    memory, _ = peak_memory(step)
    model.zero_grad()
    own = one_process_loss(model, batch, implementation) if peers.rank == 0 else 0.0
    tokens = context.sharding.length if context.replicated else context.sharding.lengths[peers.rank]
    facts = peers.all_gather_integers(
        [
            tokens,
            sent.total,
            -1 if math.isnan(expected_bytes) else expected_bytes,
            int(memory) if memory == memory else -1,
        ]
    )
    if peers.rank == 0:
        print(f"First batch on {peers.size} processes, layout {context.layout}, split {context.split}:")
        print(f"  loss {loss:.6f}; in a single process {own:.6f}; difference {abs(loss - own):.1e}")
        print(f"  {'rank':>4} {'tokens':>8} {'bytes sent':>14} {'by the formula':>15} {'peak of a step, MiB':>20}")
        for rank, row in enumerate(facts):
            tokens, total, formula, peak = (f"{value:,}" if value >= 0 else "-" for value in row)
            print(f"  {rank:>4} {tokens:>8} {total:>14} {formula:>15} {peak:>20}")
        sys.stdout.flush()
    return {
        "loss": loss,
        "one_process_loss": own,
        "bytes_sent": [fact[1] for fact in facts],
        "bytes_by_formula": [fact[2] for fact in facts],
        "peak_mib": [fact[3] for fact in facts],
    }


def parse_arguments(arguments: list[str] | None) -> tuple[LongContextArguments, ScriptTrainingArguments]:
    """Parse the command line.

    Raises:
        SystemExit: with a message for the user, if arguments contradict each other.
    """
    script_args, training_args = command_line.parse_arguments(
        NAME, (LongContextArguments, ScriptTrainingArguments), arguments, __doc__
    )
    problem = None
    if script_args.layout not in LAYOUTS:
        problem = f"--layout {script_args.layout} is not one of {', '.join(LAYOUTS)}"
    elif script_args.split not in ("zigzag", "contiguous"):
        problem = f"--split must be zigzag or contiguous, got {script_args.split}"
    elif script_args.dataset_name and script_args.train_file:
        problem = "pass either --dataset_name or --train_file"
    elif script_args.train_file and not Path(script_args.train_file).is_file():
        problem = f"--train_file {script_args.train_file} does not exist"
    elif script_args.block_size < 2:
        problem = f"--block_size {script_args.block_size} is too short: there must be at least one token to predict"
    if problem:
        raise stop(f"{problem}")
    command_line.resolve_resume(NAME, training_args)
    return script_args, training_args


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the numbers of the report."""
    script_args, training_args = parse_arguments(arguments)
    with training_folder(NAME, training_args, command_line.settings_of(script_args)):
        return train(script_args, training_args)


def train(script_args: LongContextArguments, training_args: ScriptTrainingArguments) -> dict[str, float]:
    """Report and train; returns the numbers of the report."""
    set_seed(training_args.seed)
    implementation = f"distributed_{script_args.layout}"
    model, tokenizer = load_decoder(script_args, training_args, implementation, stop)
    longest = model.config.max_position_embeddings
    if script_args.block_size > longest:
        raise stop(f"--block_size {script_args.block_size} exceeds the {longest} positions of the model.")
    try:
        texts = read_texts(
            "train",
            script_args.dataset_name,
            script_args.dataset_config_name,
            script_args.text_column,
            script_args.train_file,
        )
        blocks = token_blocks(texts, tokenizer, script_args.block_size)
    except ValueError as error:
        raise stop(f"{error}") from error
    if training_args.should_log:
        print(f"{type(model).__name__}: {len(blocks):,} sequences of {script_args.block_size:,} tokens")

    trainer_class = type("LongTrainer", (Trainer,), {"sequence_split": script_args.split})
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    results = {}
    if script_args.report:
        rows = blocks[: training_args.per_device_train_batch_size].to(training_args.device)
        results = report(trainer, {"input_ids": rows, "labels": rows}, implementation)
    train_and_save(trainer, results)
    return results


if __name__ == "__main__":
    run_script(NAME, main)
