#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Make a text embedder from a decoder and train it with contrastive loss.

SmolLM2-135M on pairs from Python's own documentation (headings and paragraphs, neighbouring paragraphs):

    python scripts/run_embedding.py --design 5 --output_dir out

A model of the Hub on data with the columns `query`, `positive` and, optionally, `negative`, on several GPUs:

    torchrun --nproc_per_node 8 scripts/run_embedding.py --model_name_or_path mistralai/Mistral-7B-v0.1 --design 5 \\
        --dataset_name yixuantt/ir_data --max_length 512 --bf16 --gradient_checkpointing --output_dir out

LoRA trains the decoder (`--lora_rank 0` trains it in full), the head is trained in full. The retrieval of held-out pairs is
measured before and after. The output folder holds the merged model: `SentenceTransformer("out")` loads it.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from hf_attn import PoolingAttentionConfig, PoolingAttentionModel, embedding_tokenizer
from hf_attn.analysis.retrieval import retrieval_ranks, retrieval_scores
from hf_attn.examples.assets import smollm2_folder
from hf_attn.examples.text_pairs import text_pairs
from hf_attn.hub import HubTrainerMixin
from hf_attn.training import arguments as command_line
from hf_attn.training.contrastive import ContrastiveCollator, ContrastiveTrainerMixin


NAME = "run_embedding.py"
stop = partial(command_line.stop, NAME)


@dataclass
class ScriptArguments:
    """Arguments of the model and the data."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Decoder, or an embedder to train further. Default: SmolLM2-135M-Instruct."},
    )
    design: int = field(default=5, metadata={"help": "Design of the paper, 1 to 5."})
    num_latents: int = field(default=8, metadata={"help": "Number of latents of the head."})
    num_pooling_heads: int = field(default=9, metadata={"help": "Number of attention heads of the pooling head."})
    pooling_head_dim: int = field(
        default=64, metadata={"help": "Dimension of the attention heads of the pooling head."}
    )
    pooling_init: str = field(
        default="mean",
        metadata={
            "help": "Initialisation of the head: mean pooling, or random as in the paper.",
            "choices": ["mean", "random"],
        },
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Number of decoder layers to use, from the bottom. Default: all."}
    )
    lora_rank: int = field(default=16, metadata={"help": "LoRA rank for the decoder; 0 to train all its weights."})
    lora_layers: int = field(
        default=10,
        metadata={"help": "Number of top layers with LoRA; the lower layers are frozen, which costs less."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a dataset, instead of Python's documentation."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_held_out: int = field(
        default=200,
        metadata={"help": "Number of rows of the dataset that are held out for the evaluation of retrieval."},
    )
    max_length: int = field(default=32, metadata={"help": "Maximum number of tokens; longer texts are truncated."})
    scale: float = field(default=20.0, metadata={"help": "Scale of the similarities in the loss."})
    reference_model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a sentence-transformers model to evaluate for comparison."},
    )
    query_prompt: str = field(default="", metadata={"help": "Prefix of every query, saved with the model."})
    document_prompt: str = field(default="", metadata={"help": "Prefix of every document, saved with the model."})


@dataclass
class EmbeddingArguments(command_line.MachineArguments):
    """transformers' arguments with other defaults."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts per evaluation step."})
    max_steps: int = field(default=100, metadata={"help": "Steps."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between two log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false, because the rows are texts."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must be true, because gathering negatives needs equal batch sizes."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


class EmbeddingTrainer(ContrastiveTrainerMixin, HubTrainerMixin, transformers.Trainer):
    """Trainer of embedders."""


def load_pairs(arguments: ScriptArguments) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out."""
    if arguments.dataset_name is None:
        splits = (text_pairs(split) for split in ("train", "test"))
        train, test = (
            [{"query": pair.query, "positive": pair.positive, "task": f"{pair.task}: {pair.topic}"} for pair in pairs]
            for pairs in splits
        )
        return train, test
    import datasets

    rows = datasets.load_dataset(arguments.dataset_name, split=arguments.dataset_split)
    missing = {"query", "positive"} - set(rows.column_names)
    if missing:
        raise stop(
            f"{arguments.dataset_name} has no column {', '.join(sorted(missing))}, only {', '.join(rows.column_names)}"
        )
    columns = ("query", "positive", "negative", "task")
    rows = rows.select_columns([name for name in columns if name in rows.column_names])
    rows = rows.shuffle(seed=0).to_list()
    if len(rows) < 2 * arguments.num_held_out:
        raise stop(f"{len(rows)} rows are too few to hold out {arguments.num_held_out} (--num_held_out)")
    return rows[arguments.num_held_out :], rows[: arguments.num_held_out]


@torch.no_grad()
def embed(model, tokenizer, texts: list[str], batch_size: int, max_length: int) -> torch.Tensor:
    """Embeddings of texts, `(texts, width)`; equal texts are computed once, beside texts of about their length."""
    different = sorted(set(texts), key=lambda text: (len(text), text))
    embeddings = []
    for start in range(0, len(different), batch_size):
        batch = tokenizer(
            different[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        output = model(**{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")})
        embeddings.append(output.pooler_output.float().cpu())
    places = {text: index for index, text in enumerate(different)}
    return torch.cat(embeddings)[[places[text] for text in texts]]


@dataclass
class Retrieval:
    """Retrieval of held-out rows: each query of a task looks for any of its positives among those of all rows.

    A query that is itself one of these documents does not find itself.
    """

    rows: list[dict]

    def __post_init__(self):
        self.documents = list(dict.fromkeys(row["positive"] for row in self.rows))
        places = {document: index for index, document in enumerate(self.documents)}
        answers = {}
        for row in self.rows:
            key = (row.get("task") or "held out", row["query"])
            answers.setdefault(key, set()).add(places[row["positive"]])
        self.tasks, self.queries = (list(values) for values in zip(*answers, strict=True))
        self.relevant = list(answers.values())
        self.ignored = [{places[query]} if query in places else () for query in self.queries]

    def ranks(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Rank of each query's first positive, from the embeddings of all queries and documents."""
        return retrieval_ranks(queries, documents, self.relevant, self.ignored)

    def scores_by_task(self, ranks: torch.Tensor) -> dict[str, dict[str, float]]:
        """Retrieval scores of the queries of each task."""
        return {
            task: retrieval_scores(ranks[[index for index, other in enumerate(self.tasks) if other == task]])
            for task in dict.fromkeys(self.tasks)
        }


def held_out_ranks(
    model, tokenizer, retrieval: Retrieval, arguments: ScriptArguments, batch_size: int
) -> torch.Tensor:
    """Ranks of the positives of the held-out queries."""
    was_training = model.training
    model.eval()
    texts = [arguments.query_prompt + query for query in retrieval.queries]
    texts += [arguments.document_prompt + document for document in retrieval.documents]
    embeddings = embed(model, tokenizer, texts, batch_size, arguments.max_length)
    model.train(was_training)
    return retrieval.ranks(*embeddings.split([len(retrieval.queries), len(retrieval.documents)]))


def reference_ranks(name_or_path: str, retrieval: Retrieval, arguments: ScriptArguments) -> torch.Tensor:
    """Ranks that another embedder, one of sentence-transformers, gives the same texts, cut at as many tokens."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise stop("--reference_model needs sentence-transformers: pip install 'hf_attn[embeddings]'") from error
    encoder = SentenceTransformer(name_or_path, device="cpu")
    encoder.max_seq_length = arguments.max_length
    return retrieval.ranks(
        encoder.encode_query(retrieval.queries, convert_to_tensor=True),
        encoder.encode_document(retrieval.documents, convert_to_tensor=True),
    )


def make_model(arguments: ScriptArguments) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The embedder and its tokenizer."""
    source = arguments.model_name_or_path or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer = embedding_tokenizer(tokenizer)
    config = transformers.AutoConfig.from_pretrained(source)
    prompts = {"query": arguments.query_prompt, "document": arguments.document_prompt}
    if isinstance(config, PoolingAttentionConfig):
        model = PoolingAttentionModel.from_pretrained(source, prompts=prompts)
    else:
        model = PoolingAttentionModel.from_base(
            source,
            dtype=torch.float32,
            design=arguments.design,
            num_latents=arguments.num_latents,
            num_pooling_heads=arguments.num_pooling_heads,
            pooling_head_dim=arguments.pooling_head_dim,
            pooling_init=arguments.pooling_init,
            prompts=prompts,
            **({} if arguments.num_hidden_layers is None else {"num_hidden_layers": arguments.num_hidden_layers}),
        )
    return model, tokenizer


def add_lora(model: PoolingAttentionModel, rank: int, num_layers: int):
    """LoRA on all linear maps of the highest layers of the decoder; the head is trained in full."""
    from peft import LoraConfig, get_peft_model

    count = model.config.num_hidden_layers
    layers = "|".join(map(str, range(max(0, count - num_layers), count)))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules=rf"model\.layers\.({layers})\.(self_attn|mlp)\.\w+_proj",
        modules_to_save=None if model.head is None else ["head"],
    )
    return get_peft_model(model, config)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the retrieval before and after, which is also in `eval_results.json`."""
    script, training = command_line.parse_arguments(NAME, (ScriptArguments, EmbeddingArguments), arguments, __doc__)
    command_line.resolve_resume(NAME, training)
    training.dataloader_pin_memory &= torch.accelerator.is_available()
    with command_line.training_folder(NAME, training, command_line.settings_of(script)):
        return train_and_measure(script, training)


def train_and_measure(script: ScriptArguments, training: EmbeddingArguments) -> dict[str, float]:
    """Train, measure the retrieval before and after, and save."""
    output_dir = Path(training.output_dir)
    set_seed(training.seed)
    train, held_out = load_pairs(script)
    if len(train) < training.train_batch_size * training.world_size:
        raise stop(
            f"{len(train)} pairs are too few for one step; use more pairs, or a smaller --per_device_train_batch_size"
        )
    model, tokenizer = make_model(script)
    # Several processes train; the first one measures.
    measures = training.process_index == 0
    batch_size = training.per_device_eval_batch_size
    model.to(training.device)
    retrieval, ranks = Retrieval(held_out), {}
    if measures:
        if script.reference_model is not None:
            ranks["reference"] = reference_ranks(script.reference_model, retrieval, script)
        ranks["before"] = held_out_ranks(model, tokenizer, retrieval, script, batch_size)
    if script.lora_rank:
        model = add_lora(model, script.lora_rank, script.lora_layers)
    trainer = EmbeddingTrainer(
        model,
        training,
        train_dataset=train,
        data_collator=ContrastiveCollator(tokenizer, script.max_length, script.query_prompt, script.document_prompt),
        processing_class=tokenizer,
        scale=script.scale,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    model = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {}
    if measures:
        ranks["after"] = held_out_ranks(model, tokenizer, retrieval, script, batch_size)
        metrics = {
            f"{when}_{name}": value for when, those in ranks.items() for name, value in retrieval_scores(those).items()
        }
        if script.lora_rank:
            model = model.merge_and_unload()
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        for name, result in (("eval_results", metrics), ("task_results", retrieval.scores_by_task(ranks["after"]))):
            (output_dir / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()
    return metrics


if __name__ == "__main__":
    command_line.run_script(NAME, main)
