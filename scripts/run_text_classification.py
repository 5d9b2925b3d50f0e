#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train wide transformers on texts, and compare models of one family: fewer layers with more heads in each.

On small ListOps expressions, a deep and a wide model; two minutes on two cores:

    python scripts/run_text_classification.py --output_dir out

The standard difficulty of the Long Range Arena, at its sizes:

    python scripts/run_text_classification.py --output_dir out --listops standard --variant listops_4x8 --num_layers 4 1 \\
        --max_steps 5000 --warmup_steps 1000 --bf16

Your own texts, byte by byte: a folder (`folder/train/<class>/*.txt`, `folder/validation/...`, or the classes alone), a file
(.csv, .json, .jsonl with the columns `text` and `label`) or a dataset of the Hub, the wide model only, pushed at the end:

    python scripts/run_text_classification.py --output_dir out --dataset_name stanfordnlp/imdb --variant byte_imdb_4x4 \\
        --num_layers 1 --max_steps 20000 --push_to_hub

Each model is saved in a folder of its own, `<layers>x<heads>`. The results go to `results.json`: accuracy, parameters, and the
latency of a single text, full and folded. See `--help` for the arguments.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_attn import WideTransformerConfig, aspect_ratio, byte_tokenizer
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.wide_attention.configuration_wide_attention import ATTENTION_TYPES
from hf_attn.modeling.wide_attention.listops import SYMBOLS, Difficulty, generate
from hf_attn.modeling.wide_attention.tokenization import symbol_tokenizer
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import MachineArguments, run_script, settings_of, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin
from hf_attn.training.writing import written_whole


try:
    import datasets
except ImportError as error:
    raise SystemExit("This script needs the extra `train`: pip install 'hf_attn[train]'") from error

NAME = "run_text_classification.py"
stop = partial(command_line.stop, NAME)

#: default configuration without a variant
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 16,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}
DIFFICULTIES = {
    "small": Difficulty(max_depth=2, max_arguments=4, min_length=4, max_length=24),
    "standard": Difficulty(),
}
#: Each model has its checkpoints in a folder of its own.
CHECKPOINTS = "*/checkpoint-*"


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further: folder or Hub id."}
    )
    variant: str | None = field(
        default=None, metadata={"help": f"Variant, which sets the sizes: {', '.join(WideTransformerConfig.variants)}."}
    )
    num_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Numbers of layers; one model is trained for each, all with the same total number of heads. Default: 4 and 1."
        },
    )
    attention_type: str = field(default="softmax", metadata={"help": f"One of {', '.join(ATTENTION_TYPES)}."})


@dataclass
class DataArguments:
    """Arguments of the data; without a dataset, on ListOps."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder, file or Hub id of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column with the texts."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "Percentage of the texts to hold out if there is no validation or test split."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum length in tokens; longer texts are truncated. Default: that of the model."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training texts to use."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Number of evaluation texts to use."})
    listops: Literal["small", "standard"] = field(default="small", metadata={"help": "Difficulty of ListOps."})
    listops_samples: int = field(
        default=20_000, metadata={"help": "Number of training expressions; a tenth is held out."}
    )


@dataclass
class ScriptTrainingArguments(MachineArguments):
    """transformers' arguments with other defaults; trains and evaluates."""

    learning_rate: float = field(default=2e-3, metadata={"help": "Largest learning rate."})
    max_steps: int = field(default=800, metadata={"help": "Steps of training."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two log lines."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints during training."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`last` continues each model from its last checkpoint in output_dir."}
    )


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
    problem = _problem(model_args, data_args, training_args)
    if problem is not None:
        raise stop(problem)
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    return model_args, data_args, training_args


def _problem(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> str | None:
    """The error in the arguments, None if there is none."""
    if model_args.model_name_or_path is not None and (model_args.variant or model_args.num_layers):
        return "--variant and --num_layers cannot be used with the weights of --model_name_or_path"
    if model_args.variant not in (None, *WideTransformerConfig.variants):
        return f"--variant {model_args.variant} is not one of {', '.join(WideTransformerConfig.variants)}"
    if model_args.attention_type not in ATTENTION_TYPES:
        return f"--attention_type {model_args.attention_type} is not one of {', '.join(ATTENTION_TYPES)}"
    if data_args.listops_samples < 10:
        return f"--listops_samples {data_args.listops_samples} is less than 10"
    if training_args.push_to_hub and len(model_args.num_layers or [4, 1]) > 1 and not model_args.model_name_or_path:
        return "--push_to_hub needs a single model: pass one value for --num_layers"
    if training_args.resume_from_checkpoint not in (None, "last"):
        return f"--resume_from_checkpoint must be `last`, got {training_args.resume_from_checkpoint}"
    if training_args.resume_from_checkpoint is not None:
        if training_args.overwrite_output_dir:
            return (
                "--resume_from_checkpoint continues a run, but --overwrite_output_dir starts a new one; pass only one of "
                "them"
            )
        if not any(Path(training_args.output_dir).glob(CHECKPOINTS)):
            return f"there is no checkpoint in {training_args.output_dir} to resume from"
    return None


# --- data ----------------------------------------------------------------------------------------------------------


def load_listops(data_args: DataArguments, seed: int) -> datasets.DatasetDict:
    """ListOps expressions and their values."""
    count = data_args.listops_samples
    pairs = list(generate(count + count // 10, DIFFICULTIES[data_args.listops], seed))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(10)})

    def split(part: list[tuple[str, int]]) -> datasets.Dataset:
        texts, labels = zip(*part, strict=True)
        return datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)

    return datasets.DatasetDict({"train": split(pairs[:count]), "validation": split(pairs[count:])})


def read_folder(folder: Path) -> datasets.DatasetDict:
    """Text files in folders of classes, in folders of splits or not."""
    names = ("train", "validation", "test")
    roots = {name: folder / name for name in names if (folder / name).is_dir()} or {"train": folder}
    rows = {
        split: [
            {"text": file.read_text(encoding="utf-8"), "label": file.parent.name}
            for file in sorted(root.glob("*/*.txt"))
        ]
        for split, root in roots.items()
    }
    empty = [str(roots[split]) for split, found in rows.items() if not found]
    if empty:
        raise stop(f"there is no <class>/*.txt in {', '.join(empty)}")
    return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})


def load_texts(data_args: DataArguments, seed: int) -> datasets.DatasetDict:
    """Texts and classes in the columns `text` and `label` of the splits `train` and `validation`."""
    if data_args.dataset_name is None:
        splits = load_listops(data_args, seed)
    else:
        splits = _load(data_args)
        if "train" not in splits:
            raise stop(f"{data_args.dataset_name} has no split 'train', only {', '.join(splits)}")
        for column in (data_args.text_column, data_args.label_column):
            if column not in splits["train"].column_names:
                found = ", ".join(splits["train"].column_names)
                raise stop(f"{data_args.dataset_name} has no column {column!r}, only {found}")
        held_out = next((name for name in ("validation", "test") if name in splits), None)
        if held_out is None:
            share = data_args.validation_split_percentage / 100
            splits, held_out = splits["train"].train_test_split(share, seed=seed), "test"
        splits = datasets.DatasetDict({"train": splits["train"], "validation": splits[held_out]})
        splits = splits.select_columns([data_args.text_column, data_args.label_column])
        renamed = {data_args.text_column: "text", data_args.label_column: "label"}
        splits = splits.rename_columns({old: new for old, new in renamed.items() if old != new})
        if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
            splits = _name_classes(splits)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None:
            splits[split] = splits[split].shuffle(seed=seed).select(range(min(limit, len(splits[split]))))
    empty = [split for split, rows in splits.items() if any(not text for text in rows["text"])]
    if empty:
        raise stop(f"there are empty texts in {' and '.join(empty)}; leave them out")
    return splits


def _load(data_args: DataArguments) -> datasets.DatasetDict:
    path, kinds = Path(data_args.dataset_name), {".csv": "csv", ".json": "json", ".jsonl": "json"}
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        if path.suffix not in kinds:
            raise stop(f"{path} is not a {', '.join(kinds)} file")
        return datasets.load_dataset(kinds[path.suffix], data_files={"train": str(path)})
    return datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name)


def _name_classes(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    names = sorted({str(label) for rows in splits.values() for label in rows["label"]})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    indices = {name: index for index, name in enumerate(names)}
    return splits.map(lambda row: {"label": indices[str(row["label"])]}, features=features)


def tokenize(
    splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.DatasetDict:
    """Token ids of all texts; reports how many were truncated."""

    def encode(batch: dict) -> dict:
        whole = tokenizer(batch["text"], verbose=False)["input_ids"]
        return {"input_ids": [ids[:max_length] for ids in whole], "whole": [len(ids) for ids in whole]}

    tokens = splits.map(encode, batched=True, remove_columns="text", desc="Tokenising")
    for split, rows in tokens.items():
        cut = sum(length > max_length for length in rows["whole"])
        if cut:
            print(f"{split}: {cut:,} of {len(rows):,} texts are longer than {max_length} tokens and were truncated")
    return tokens.remove_columns("whole")


# --- models --------------------------------------------------------------------------------------------------------


def make_models(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> dict[str, Callable[[], PreTrainedModel]]:
    """Arguments of each model, by the name of its folder."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if model_args.model_name_or_path is not None:
        source = model_args.model_name_or_path
        return {"model": lambda: AutoModelForSequenceClassification.from_pretrained(source, **labels)}
    facts = {"vocab_size": len(tokenizer), "attention_type": model_args.attention_type, **labels}
    facts["max_position_embeddings"] = tokenizer.model_max_length
    if model_args.variant is not None:
        base = WideTransformerConfig.from_variant(model_args.variant, **facts)
    else:
        base = WideTransformerConfig(**{**SMALL, **facts})
    try:
        configs = [aspect_ratio(base, layers) for layers in model_args.num_layers or [4, 1]]
    except ValueError as error:
        raise stop(f"--num_layers: {error}") from error
    return {
        f"{config.num_hidden_layers}x{config.num_attention_heads}": (
            lambda config=config: AutoModelForSequenceClassification.from_config(config)
        )
        for config in configs
    }


@torch.no_grad()
def latency(model: PreTrainedModel, texts: datasets.Dataset, count: int = 20) -> float:
    """Median milliseconds of a single text."""
    inputs = [
        torch.tensor([row["input_ids"]], device=model.device) for row in texts.select(range(min(count, len(texts))))
    ]
    seconds = []
    for ids in [inputs[0], *inputs]:
        start = time.perf_counter()
        model(ids).logits.cpu()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) * 1e3


def accuracy(prediction) -> dict[str, float]:
    """Share of texts that are classified right."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the script; returns the results by model."""
    model_args, data_args, training_args = parse_arguments(arguments)
    logging.set_verbosity(training_args.get_process_log_level())
    with training_folder(NAME, training_args, settings_of(model_args, data_args), checkpoints=CHECKPOINTS):
        return train_and_evaluate(model_args, data_args, training_args)


def train_and_evaluate(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> dict[str, dict[str, float]]:
    """Train and evaluate each model; returns the results by model."""
    output_dir, resumes = Path(training_args.output_dir), training_args.resume_from_checkpoint is not None
    with training_args.main_process_first(desc="data"):
        splits = load_texts(data_args, training_args.seed)
    names = splits["train"].features["label"].names
    if model_args.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        longest = AutoConfig.from_pretrained(model_args.model_name_or_path).max_position_embeddings
    else:
        is_listops = data_args.dataset_name is None
        sizes = WideTransformerConfig.variants.get(model_args.variant, {})
        longest = sizes.get("max_position_embeddings", WideTransformerConfig.max_position_embeddings)
        longest = DIFFICULTIES[data_args.listops].max_length if is_listops else data_args.max_length or longest
        tokenizer = symbol_tokenizer(SYMBOLS, longest) if is_listops else byte_tokenizer(longest)
    max_length = min(data_args.max_length or longest, longest)
    with training_args.main_process_first(desc="tokens"):
        tokens = tokenize(splits, tokenizer, max_length)
    counts = Counter(tokens["validation"]["label"])
    print(", ".join(f"{split}: {len(rows):,} texts" for split, rows in tokens.items()))

    results = {}
    for name, make_model in make_models(model_args, tokenizer, names).items():
        set_seed(training_args.seed)
        training_args.output_dir = str(output_dir / name)
        trainer = Trainer(
            model=make_model(),
            args=training_args,
            train_dataset=tokens["train"],
            eval_dataset=tokens["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        last = (
            get_last_checkpoint(training_args.output_dir)
            if resumes and Path(training_args.output_dir).is_dir()
            else None
        )
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        card = {"dataset_tags": data_args.dataset_name, "finetuned_from": model_args.model_name_or_path}
        if training_args.push_to_hub:
            trainer.push_to_hub(**card)
        else:
            trainer.create_model_card(**card)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        results[name] = {
            "accuracy": metrics["eval_accuracy"],
            "most frequent class": max(counts.values()) / counts.total(),
            "parameters": model.num_parameters(),
            "latency ms": latency(model, tokens["validation"]),
        }
        try:
            results[name]["folded ms"] = latency(model.fold(), tokens["validation"])
        except (AttributeError, ValueError):
            # Not of this family, or one that cannot be folded.
            results[name]["folded ms"] = None
    if training_args.should_save:
        with written_whole(output_dir / "results.json") as part:
            part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for name, result in results.items():
            print(name, ", ".join(f"{key} {value:,.4g}" for key, value in result.items() if value is not None))
    return results


if __name__ == "__main__":
    run_script(NAME, main)
