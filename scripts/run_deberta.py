#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Pre-train a DeBERTa with its enhanced mask decoder, then fine-tune it with and without SiFT.

A small model from random weights, on English prose that is part of Python, about six minutes on one core:

    python scripts/run_deberta.py --output_dir out

A published size from an official checkpoint that was converted (`hf-attn convert deberta ...`), on text of one's own:

    python scripts/run_deberta.py --model_name_or_path deberta-base --train_file text.txt --finetune_epochs 0 --output_dir out

The evaluation also prints the entropy of the masked tokens: no model that ignores the context can have a lower loss. The
fine-tuning task is to say to which topic of the prose a paragraph belongs; with `--train_file` there is none. The
pre-trained encoder is an ordinary DeBERTa of transformers there, made fast by `apply_fast_attention`.
"""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_attn import DataCollatorForNGramMasking, DebertaEMDConfig, SiFTTrainerMixin, apply_fast_attention
from hf_attn.examples.assets import load_texts
from hf_attn.hub import HubTrainerMixin
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, run_script, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin
from hf_attn.training.writing import written_whole


NAME = "run_deberta.py"
stop = partial(command_line.stop, NAME)


@dataclass
class ScriptArguments:
    """Arguments of the model and the data."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of a DebertaEMDForMaskedLM to train further. Default: a small model with random "
            "weights."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Text file with one document per line, instead of Python's documentation."}
    )
    vocab_size: int = field(default=3000, metadata={"help": "Vocabulary size of a model with random weights."})
    hidden_size: int = field(default=144, metadata={"help": "Hidden size of a model with random weights."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Number of layers of a model with random weights."})
    block_size: int = field(default=80, metadata={"help": "Tokens per sequence."})
    max_ngram: int = field(default=3, metadata={"help": "Maximum number of consecutive masked words."})
    finetune_epochs: float = field(
        default=6, metadata={"help": "Epochs of each fine-tuning run; 0 to skip fine-tuning."}
    )
    finetune_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of fine-tuning."})
    num_topics: int = field(default=10, metadata={"help": "Number of topics to classify; the longest ones are used."})
    sift_lambda: float = field(default=5.0, metadata={"help": "Weight of SiFT's adversarial loss."})
    seeds: int = field(default=2, metadata={"help": "Number of fine-tuning runs of each kind."})


@dataclass
class PretrainingArguments(RunArguments):
    """transformers' arguments with other defaults."""

    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of pre-training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences per evaluation step."})
    max_steps: int = field(default=1500, metadata={"help": "Steps of pre-training."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two log lines."})


class PretrainingTrainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Writes the model card of the family."""


class SiFTTrainer(ExactEvaluationMixin, SiFTTrainerMixin, transformers.Trainer):
    """Trainer with scale-invariant fine-tuning."""


def load_documents(arguments: ScriptArguments) -> tuple[list[str], list[str]]:
    """Documents to train on and documents held out."""
    if arguments.train_file is None:
        return load_texts("train"), load_texts("test")
    lines = [line for line in Path(arguments.train_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 20:
        raise stop(f"{arguments.train_file} has {len(lines)} documents (lines), but at least 20 are needed")
    held_out = max(1, len(lines) // 20)
    return lines[held_out:], lines[:held_out]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of DeBERTa."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def make_sequences(texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> list[dict]:
    """Sequences of `block_size` tokens with the special tokens around them; documents are cut, and their rests kept."""
    room = block_size - tokenizer.num_special_tokens_to_add()
    sequences = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            if len(piece) > 3:
                sequences.append({"input_ids": [tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]})
    return sequences


def unigram_entropy(train: list[dict], held_out: list[dict], vocab_size: int) -> float:
    """Cross entropy in nats of held-out tokens under the token frequencies of the training text, smoothed by one."""
    counts = Counter(token for sequence in train for token in sequence["input_ids"][1:-1])
    total = counts.total() + vocab_size
    tokens = [token for sequence in held_out for token in sequence["input_ids"][1:-1]]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)


def pretrain(arguments: ScriptArguments, training: PretrainingArguments) -> dict[str, float]:
    """Train the masked language model into `output_dir`; returns the metrics."""
    documents, held_out = load_documents(arguments)
    if arguments.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        model = AutoModelForMaskedLM.from_pretrained(arguments.model_name_or_path)
    else:
        tokenizer = train_tokenizer(documents, arguments.vocab_size)
        config = DebertaEMDConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=max(1, arguments.hidden_size // 48),
            intermediate_size=4 * arguments.hidden_size,
            max_position_embeddings=max(128, arguments.block_size),
            position_buckets=32,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForMaskedLM.from_config(config)
    train = make_sequences(documents, tokenizer, arguments.block_size)
    test = make_sequences(held_out, tokenizer, arguments.block_size)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
    print(f"{len(train):,} sequences to train on, {len(test):,} held out")
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorForNGramMasking(tokenizer, max_ngram=arguments.max_ngram),
    )
    metrics = {"before": trainer.evaluate()["eval_loss"]}
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    # The same masks before and after would need the same seed: the held-out text is large enough without.
    metrics["after"] = trainer.evaluate()["eval_loss"]
    metrics["unigram"] = unigram_entropy(train, test, len(tokenizer))
    print(
        f"held-out loss of masked tokens: {metrics['before']:.2f} before, {metrics['after']:.2f} after; a model that ignores "
        f"the context: {metrics['unigram']:.2f}"
    )
    fill = pipeline("fill-mask", model=training.output_dir)
    for text in ("The list of [MASK] is empty.", "If the argument is [MASK], an exception is raised."):
        guesses = ", ".join(
            repr(guess["token_str"]) for guess in fill(text.replace("[MASK]", tokenizer.mask_token))[:4]
        )
        print(f"{text}  ->  {guesses}")
    return metrics


def make_topics(arguments: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], list[dict]]:
    """Paragraphs of the longest documents with the number of the document; every fourth paragraph is held out."""
    documents = sorted(load_texts("train"), key=len, reverse=True)[: arguments.num_topics]
    rows = []
    for label, document in enumerate(documents):
        for sequence in make_sequences([document], tokenizer, arguments.block_size // 2):
            rows.append({**sequence, "labels": label})
    return [row for number, row in enumerate(rows) if number % 4], rows[::4]


def finetune(
    arguments: ScriptArguments, training: PretrainingArguments, sift_lambda: float, seed: int
) -> dict[str, float]:
    """Fine-tune the encoder that [`pretrain`] has saved; returns accuracy and seconds."""
    tokenizer = AutoTokenizer.from_pretrained(training.output_dir)
    train, test = make_topics(arguments, tokenizer)
    fields = json.loads((Path(training.output_dir) / "config.json").read_text(encoding="utf-8"))
    for name in ("model_type", "auto_map", "architectures"):
        fields.pop(name, None)
    set_seed(seed)
    model = DebertaV2ForSequenceClassification.from_pretrained(
        training.output_dir, config=DebertaV2Config(**fields, num_labels=arguments.num_topics)
    )
    apply_fast_attention(model)
    trainer = SiFTTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(training.output_dir) / "finetuned"),
            num_train_epochs=arguments.finetune_epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=arguments.finetune_learning_rate,
            warmup_steps=0.1,
            seed=seed,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=training.dataloader_pin_memory,
            use_cpu=training.use_cpu,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: {
            "accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))
        },
        sift_lambda=sift_lambda,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    return {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"], "seconds": seconds}


def main(arguments: list[str] | None = None) -> dict:
    """Run the script; returns all metrics, which are also in `results.json`."""
    script, training = command_line.parse_arguments(NAME, (ScriptArguments, PretrainingArguments), arguments, __doc__)
    command_line.resolve_resume(NAME, training)
    training.dataloader_pin_memory &= torch.accelerator.is_available()
    transformers.logging.set_verbosity(training.get_process_log_level())
    with training_folder(NAME, training, command_line.settings_of(script)):
        return pretrain_and_finetune(script, training)


def pretrain_and_finetune(script: ScriptArguments, training: PretrainingArguments) -> dict:
    """Both stages; returns all metrics."""
    set_seed(training.seed)
    results = {"pretraining": pretrain(script, training)}
    if script.finetune_epochs > 0 and script.train_file is None:
        for name, sift_lambda in {"plain": 0.0, "sift": script.sift_lambda}.items():
            runs = [finetune(script, training, sift_lambda, seed) for seed in range(script.seeds)]
            results[name] = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
            print(name, ", ".join(f"{key} {value:.3f}" for key, value in results[name].items()))
        cost = results["sift"]["seconds"] / results["plain"]["seconds"]
        print(f"SiFT takes {cost:.2f} times as long as plain fine-tuning")
    if training.should_save:
        with written_whole(Path(training.output_dir) / "results.json") as part:
            part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    run_script(NAME, main)
