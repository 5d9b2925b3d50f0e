#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train a causal language model on documents of very different lengths, placed by Zeppelin.

SmolLM2-135M on the topics of Python's own documentation, 8 documents a step on two processes:

    torchrun --nproc_per_node 2 scripts/train_zeppelin.py --max_steps 10 --output_dir out

Before training the same batch is computed in three ways, and the idle share of each process is printed: with Zeppelin's plan,
with every document split evenly over all processes (even context parallelism), and with the documents dealt out and padded to the
longest one. Shares are of CPU seconds, without waiting, so they are comparable where processes share cores; on GPUs, which
has not been run, they say nothing. See `--help` for the arguments of this script, and transformers' `TrainingArguments`
for the others.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers
from transformers import set_seed

from hf_attn.distributed.context import activated, global_loss
from hf_attn.distributed.exchange import Peers
from hf_attn.distributed.measure import idle_shares, measure_attention
from hf_attn.distributed.zeppelin.parallel import Cluster, EvenCluster, ZeppelinParallel
from hf_attn.distributed.zeppelin.partition import PlanError
from hf_attn.distributed.zeppelin.trainer import ZeppelinCollator, ZeppelinTrainerMixin
from hf_attn.examples.assets import read_texts
from hf_attn.examples.decoder_training import DecoderArguments, SharedTrainingArguments, load_decoder, train_and_save
from hf_attn.hub import HubTrainerMixin
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import run_script, training_folder


NAME = "train_zeppelin.py"
stop = partial(command_line.stop, NAME)


@dataclass
class ZeppelinArguments(DecoderArguments):
    """What to train, on what, and where."""

    max_length: int = field(default=1024, metadata={"help": "Longer documents are split into pieces of this length."})
    num_nodes: int = field(
        default=1, metadata={"help": "Number of nodes; each must have the same number of processes."}
    )
    capacity: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens per process. Default: 15%% more than the batch needs."},
    )


@dataclass
class ScriptTrainingArguments(SharedTrainingArguments):
    """transformers' arguments with other defaults."""

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Documents per step, over all processes."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false, because the documents contain only tokens."}
    )


class Trainer(ZeppelinTrainerMixin, HubTrainerMixin, transformers.Trainer):
    """Each batch of documents has a plan of its own."""


def measured(peers: Peers, step: Callable[[], None]) -> dict[str, list[float]]:
    """Of every process: CPU seconds of a step, those of them in attention, and the longest time on the clock."""
    peers.all_gather_integers([0])
    wall, cpu = time.perf_counter(), time.process_time()
    with measure_attention() as attention:
        step()
    values = [time.process_time() - cpu, attention.seconds, time.perf_counter() - wall]
    gathered = peers.all_gather_integers([int(1e6 * value) for value in values])
    step_seconds, attention_seconds, walls = ([row[i] / 1e6 for row in gathered] for i in range(3))
    return {"step": step_seconds, "attention": attention_seconds, "wall": max(walls)}


def report(trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Measure a batch in three ways and print what the processes do while others work."""
    model, peers = trainer.model, trainer.sequence_context.peers
    tokens = batch["input_ids"].shape[1]
    model.train()

    def shared(context) -> Callable[[], None]:
        def step() -> None:
            with activated(context):
                loss = model(**context.shard(batch)).loss
                global_loss(loss, peers).backward()
            losses.append(loss.item())

        return step

    losses: list[float] = []
    cluster = trainer.sequence_context.cluster
    even = ZeppelinParallel(peers, EvenCluster(cluster.nodes, cluster.gpus_per_node))
    methods = {
        "Zeppelin": shared(trainer.sequence_context),
        "even ring": shared(even),
        "padding": padded_step(model, batch, peers),
    }
    results = {}
    for name, step in methods.items():
        model.set_attn_implementation("sdpa" if name == "padding" else "distributed_zeppelin")
        results[name] = measured(peers, step)
        model.zero_grad()
    model.set_attn_implementation("distributed_zeppelin")
    if peers.rank == 0:
        print_report(results, trainer, tokens)
    return results


def padded_step(model, batch: dict[str, torch.Tensor], peers: Peers) -> Callable[[], None]:
    """Documents dealt out to the processes in turn, as rows that are as long as the longest document of the batch."""
    bounds = batch["cu_seq_lens_q"].tolist()
    documents = [batch["input_ids"][0, a:b] for a, b in itertools.pairwise(bounds)]
    longest = max(map(len, documents))
    own = documents[peers.rank :: peers.size]

    def step() -> None:
        if not own:
            return
        rows = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in own])
        mask = torch.stack([torch.arange(longest) < len(row) for row in own]).to(rows.device)
        labels = rows.masked_fill(~mask, -100)
        model(input_ids=rows, attention_mask=mask.long(), labels=labels, use_cache=False).loss.backward()

    return step


def print_report(results: dict[str, dict], trainer: Trainer, tokens: int) -> None:
    plan = trainer.last_plan
    zones = ", ".join(f"{plan.zones.count(zone)} {zone}" for zone in dict.fromkeys(plan.zones))
    print(f"First batch: {len(plan.lengths)} documents of {min(plan.lengths)} to {max(plan.lengths)} tokens; {zones}")
    print(f"  {'method':<12}{'tokens/s':>10}{'longest CPU s':>15}  idle time of each process: step | attention")
    for name, found in results.items():
        shares = " | ".join(
            " ".join(f"{share:4.0%}" for share in idle_shares(found[part])) if any(found[part]) else "not measured"
            for part in ("step", "attention")
        )
        print(f"  {name:<12}{tokens / found['wall']:>10.0f}{max(found['step']):>15.2f}  {shares}", flush=True)


def parse_arguments(arguments: list[str] | None) -> tuple[ZeppelinArguments, ScriptTrainingArguments]:
    """Parse the command line.

    Raises:
        SystemExit: with a message for the user, if arguments contradict each other.
    """
    script_args, training_args = command_line.parse_arguments(
        NAME, (ZeppelinArguments, ScriptTrainingArguments), arguments, __doc__
    )
    problem = None
    if script_args.max_length < 2:
        problem = f"--max_length {script_args.max_length} is too short: there must be at least one token to predict"
    if problem:
        raise stop(f"{problem}")
    command_line.resolve_resume(NAME, training_args)
    return script_args, training_args


def load_documents(script_args: ZeppelinArguments, tokenizer) -> list[dict[str, list[int]]]:
    """Token ids of each document; those beyond `max_length` in pieces."""
    try:
        texts = read_texts("train", script_args.dataset_name, script_args.dataset_config_name, script_args.text_column)
    except ValueError as error:
        raise stop(f"{error}") from error
    size = script_args.max_length
    documents = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        documents += [{"input_ids": ids[start : start + size]} for start in range(0, len(ids), size)]
    return documents


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Run the script; returns the measurements."""
    script_args, training_args = parse_arguments(arguments)
    with training_folder(NAME, training_args, command_line.settings_of(script_args)):
        return train(script_args, training_args)


def train(script_args: ZeppelinArguments, training_args: ScriptTrainingArguments) -> dict[str, dict]:
    """Report and train; returns the numbers of the report."""
    set_seed(training_args.seed)
    model, tokenizer = load_decoder(script_args, training_args, "distributed_zeppelin", stop)
    documents = load_documents(script_args, tokenizer)
    if training_args.should_log:
        lengths = sorted(len(document["input_ids"]) for document in documents)
        print(
            f"{len(documents):,} documents of {lengths[0]} to {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]}"
        )

    options = {"num_nodes": script_args.num_nodes, "sequence_capacity": script_args.capacity}
    try:
        cluster = Cluster.of(training_args.world_size, script_args.num_nodes, script_args.capacity)
        trainer = type("UnevenTrainer", (Trainer,), options)(
            model=model,
            args=training_args,
            train_dataset=documents,
            processing_class=tokenizer,
            data_collator=ZeppelinCollator(cluster),
        )
        results = {}
        if script_args.report:
            first = next(iter(trainer.get_train_dataloader()))
            results = report(trainer, trainer._prepare_inputs(first))
        train_and_save(trainer, results)
    except PlanError as error:
        raise stop(f"{error}") from error
    return results


if __name__ == "__main__":
    run_script(NAME, main)
