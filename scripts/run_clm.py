#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train a causal language model of the catalogue, from scratch or from a checkpoint.

From scratch, on English prose that is part of Python; a small model, two minutes on two cores:

    python scripts/run_clm.py --model_type sigmoid_attention --output_dir out --max_steps 300

A published size on a dataset of the Hub, on several GPUs, with the model pushed at the end:

    torchrun --nproc_per_node 8 scripts/run_clm.py --model_type sigmoid_attention --variant gala_85m \\
        --tokenizer_name HuggingFaceTB/SmolLM2-135M --block_size 4096 --dataset_name HuggingFaceFW/fineweb \\
        --dataset_config_name sample-10BT --bf16 --output_dir out --push_to_hub

In addition to the loss, the evaluation prints the unigram entropy of the held-out text. No model that ignores the
context can have a lower loss. See `--help` for the arguments of this script, and transformers' `TrainingArguments` for the others.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_attn
from hf_attn.analysis.context_perplexity import perplexity_of
from hf_attn.catalog import families
from hf_attn.examples.assets import load_texts
from hf_attn.hub import HubTrainerMixin
from hf_attn.patching.sigma_reparam import apply_sigma_reparam
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, parse_overrides, run_script, settings_of, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin
from hf_attn.training.text import train_tokenizer
from hf_attn.training.writing import files_written_whole


try:
    import datasets
except ImportError as error:
    raise SystemExit("This script needs the extra `train`: pip install 'hf_attn[train]'") from error

NAME = "run_clm.py"
stop = partial(command_line.stop, NAME)

MODEL_TYPES = tuple(family.model_type for family in families() if "AutoModelForCausalLM" in family.models)

#: default configuration of a model from scratch, as far as its class has these fields
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL_BLOCK_SIZE = 128


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further: folder or Hub id of any causal model."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": f"Family to train from scratch: {', '.join(MODEL_TYPES)}."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "Published variant of the family, which sets its sizes."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model to train from scratch: JSON file, folder or Hub id."}
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the configuration, such as `hidden_size=512 shared_layers=[2,3]`."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the tokenizer. Default: that of the checkpoint or, from scratch, a new one "
            "trained on the training text."
        },
    )
    vocab_size: int = field(default=1024, metadata={"help": "Vocabulary size of a new tokenizer."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})
    sigma_reparam: Literal["preserve", "unit"] | None = field(
        default=None,
        metadata={
            "help": "Apply sigma-reparametrisation to the linear layers: keep the function of the model (`preserve`), "
            "or start with spectral norms of 1 (`unit`); see `apply_sigma_reparam`."
        },
    )


@dataclass
class DataArguments:
    """Arguments of the data; without a dataset and a file, on the topics of Python's own documentation."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub id of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training text to hold out if there is no validation text."}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per sequence. Default: the maximum length of the model, at most 1024; "
            f"{SMALL_BLOCK_SIZE} for a model from scratch without a published size."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training sequences to use."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Number of evaluation sequences to use."})


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with other defaults; trains and evaluates unless --do_train or --do_eval is given."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Default: 3e-3 from scratch, which is suitable for small models; 5e-5 from a checkpoint."},
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})


class Trainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Writes the model card of the family."""


def parse_arguments(arguments: list[str] | None) -> tuple[ModelArguments, DataArguments, ScriptTrainingArguments]:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME, (ModelArguments, DataArguments, ScriptTrainingArguments), arguments, __doc__
    )
    problem = _problem(model_args, data_args)
    if problem is not None:
        raise stop(problem)
    if training_args.learning_rate is None:
        training_args.learning_rate = 5e-5 if model_args.model_name_or_path is not None else 3e-3
    command_line.prepare_run(NAME, training_args)
    return model_args, data_args, training_args


def _problem(model_args: ModelArguments, data_args: DataArguments) -> str | None:
    """The error in the arguments, None if there is none."""
    sources = ("model_name_or_path", "model_type", "config_name")
    if sum(getattr(model_args, name) is not None for name in sources) != 1:
        return f"pass exactly one of {', '.join(f'--{name}' for name in sources)}"
    if model_args.model_type not in (None, *MODEL_TYPES):
        return f"--model_type {model_args.model_type} is not one of {', '.join(MODEL_TYPES)}"
    if model_args.variant is not None and model_args.model_type is None:
        return "--variant needs --model_type"
    if model_args.config_overrides and model_args.model_name_or_path is not None:
        return "--config_overrides cannot be used with the weights of --model_name_or_path"
    if data_args.dataset_name is not None and (data_args.train_file or data_args.validation_file):
        return "pass either --dataset_name or files"
    if data_args.validation_file is not None and data_args.train_file is None:
        return "--validation_file needs a --train_file"
    for name in ("train_file", "validation_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():
            return f"--{name} {path} does not exist"
    return None


# --- data ----------------------------------------------------------------------------------------------------------


def load_documents(data_args: DataArguments) -> datasets.DatasetDict:
    """Documents in the column `text` of the splits `train` and `validation`."""
    if data_args.dataset_name is not None:
        raw = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name)
        if "train" not in raw:
            raise stop(f"{data_args.dataset_name} has no split 'train', only {', '.join(raw)}")
        columns = raw["train"].column_names
        if data_args.text_column not in columns:
            raise stop(
                f"{data_args.dataset_name} has no column {data_args.text_column!r}; choose --text_column from "
                f"{', '.join(columns)}"
            )
        splits = [split for split in ("train", "validation") if split in raw]
        raw = datasets.DatasetDict({split: raw[split].select_columns(data_args.text_column) for split in splits})
        if data_args.text_column != "text":
            raw = raw.rename_column(data_args.text_column, "text")
    elif data_args.train_file is not None:
        paths = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict({"text": [Path(path).read_text(encoding="utf-8")]})
                for split, path in paths.items()
                if path is not None
            }
        )
    else:
        raw = datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict({"text": load_texts("train")}),
                "validation": datasets.Dataset.from_dict({"text": load_texts("test")}),
            }
        )
    return raw


def load_tokenizer(
    model_args: ModelArguments, training_args: TrainingArguments, documents: datasets.Dataset
) -> PreTrainedTokenizerBase:
    """The requested tokenizer, that of the checkpoint, or one that the first process trains."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    folder = training_args.resume_from_checkpoint or training_args.output_dir
    if training_args.resume_from_checkpoint is None and training_args.local_process_index == 0:
        with files_written_whole(folder) as part:
            texts = (text for batch in documents.iter(batch_size=1000) for text in batch["text"])
            train_tokenizer(texts, model_args.vocab_size).save_pretrained(part)
    return AutoTokenizer.from_pretrained(folder)


def make_blocks(
    documents: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, block_size: int
) -> datasets.DatasetDict:
    """Tokenise, join all documents and cut them into sequences of `block_size`.

    The remainder of every thousand documents is dropped.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded["input_ids"]]}

    def cut(batch: dict) -> dict:
        ids = list(chain.from_iterable(batch["input_ids"]))
        blocks = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    blocks = datasets.DatasetDict(
        {
            split: rows.map(
                tokenize, batched=True, remove_columns=rows.column_names, desc=f"Tokenising ({split})"
            ).map(cut, batched=True, desc=f"Cutting ({split})")
            for split, rows in documents.items()
        }
    )
    if "validation" not in blocks:
        _check_enough(blocks["train"], "train", block_size, at_least=2)
        parts = blocks["train"].train_test_split(data_args.validation_split_percentage / 100, shuffle=False)
        blocks = datasets.DatasetDict({"train": parts["train"], "validation": parts["test"]})
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        _check_enough(blocks[split], split, block_size)
        if limit is not None:
            blocks[split] = blocks[split].select(range(min(limit, len(blocks[split]))))
    return blocks


def _check_enough(blocks: datasets.Dataset, split: str, block_size: int, at_least: int = 1) -> None:
    if len(blocks) < at_least:
        raise stop(
            f"the {split} text has {len(blocks)} sequences of {block_size} tokens, but at least {at_least} are "
            "needed; use more text or a smaller --block_size"
        )


def unigram_entropy(blocks: datasets.Dataset) -> float:
    """Entropy in nats of the token frequencies: the lowest loss of any model that ignores the context."""
    counts = Counter(chain.from_iterable(blocks["input_ids"]))
    frequencies = torch.tensor(list(counts.values()), dtype=torch.float64) / counts.total()
    return -(frequencies * frequencies.log()).sum().item()


# --- model ---------------------------------------------------------------------------------------------------------


def make_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """Configuration of a model that is trained from scratch."""
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if model_args.config_name is not None:
        config = AutoConfig.from_pretrained(model_args.config_name)
        overrides = parse_overrides(NAME, model_args.config_overrides, type(config))
        return type(config).from_dict({**config.to_dict(), **ids, **overrides})

    config_class = type(AutoConfig.for_model(model_args.model_type))
    overrides = {**ids, **parse_overrides(NAME, model_args.config_overrides, config_class)}
    if model_args.variant is not None:
        variants = getattr(config_class, "variants", {})
        if model_args.variant not in variants:
            raise stop(
                f"{model_args.model_type} has no variant {model_args.variant!r}; its variants: "
                f"{', '.join(variants) or 'none'}"
            )
        return config_class.from_variant(model_args.variant, **overrides)
    # Some mechanisms also derive constants from the maximum length.
    small = {**SMALL, "max_position_embeddings": data_args.block_size or SMALL_BLOCK_SIZE}
    known = {config_field.name for config_field in fields(config_class)}
    return config_class(**{**{name: value for name, value in small.items() if name in known}, **overrides})


def make_model(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model to train, with the requested attention function."""
    attention = {"attn_implementation": model_args.attn_implementation}
    if model_args.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32, **attention)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise stop(
                f"the tokenizer has {len(tokenizer)} tokens, but the model only "
                f"{model.get_input_embeddings().num_embeddings}; use the tokenizer of the model."
            )
    else:
        model = AutoModelForCausalLM.from_config(make_config(model_args, data_args, tokenizer), **attention)
    if model_args.attn_implementation is not None:
        hf_attn.uses_attention(model, model_args.attn_implementation)
    if model_args.sigma_reparam is not None:
        try:
            apply_sigma_reparam(model, init=model_args.sigma_reparam)
        except ValueError as error:
            raise stop(f"--sigma_reparam: {error}") from error
    return model


def choose_block_size(data_args: DataArguments, config: PreTrainedConfig) -> int:
    """The length of a sequence, which must not exceed the maximum of the model."""
    longest = getattr(config, "max_position_embeddings", None) or 1024
    block_size = data_args.block_size or min(longest, 1024)
    if block_size > longest:
        raise stop(
            f"--block_size {block_size} exceeds the {longest} positions of the model (max_position_embeddings)."
        )
    return block_size


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    model_args, data_args, training_args = parse_arguments(arguments)
    logging.set_verbosity(training_args.get_process_log_level())
    with training_folder(NAME, training_args, settings_of(model_args, data_args)):
        set_seed(training_args.seed)
        return train_and_evaluate(model_args, data_args, training_args)


def train_and_evaluate(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> dict[str, float]:
    """Train and evaluate; returns the metrics of the evaluation."""
    with training_args.main_process_first(desc="data"):
        documents = load_documents(data_args)
        tokenizer = load_tokenizer(model_args, training_args, documents["train"])
    model = make_model(model_args, data_args, tokenizer)
    with training_args.main_process_first(desc="sequences"):
        blocks = make_blocks(documents, tokenizer, data_args, choose_block_size(data_args, model.config))

    if training_args.should_log:
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
        print(", ".join(f"{split}: {len(rows):,} sequences" for split, rows in blocks.items()))
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)

    metrics = {}
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_perplexity"] = perplexity_of(metrics["eval_loss"])
        metrics["eval_unigram_entropy"] = unigram_entropy(blocks["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"dataset_tags": data_args.dataset_name, "finetuned_from": model_args.model_name_or_path}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return metrics


if __name__ == "__main__":
    run_script(NAME, main)
