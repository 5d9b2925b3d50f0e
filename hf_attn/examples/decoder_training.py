"""What the scripts share that train a decoder on sequences of all processes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from ..training.arguments import RunArguments
from ..training.writing import written_whole
from .assets import AssetError, smollm2_folder


@dataclass
class DecoderArguments:
    """Which decoder to train, and on what."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a Llama-like model. Default: SmolLM2-135M, downloaded once."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub id of a text dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    lora_rank: int | None = field(default=None, metadata={"help": "Train only LoRA adapters, of this rank."})
    report: bool = field(default=True, metadata={"help": "Measure the first batch before training."})


@dataclass
class SharedTrainingArguments(RunArguments):
    """Arguments of a run with other defaults."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Of AdamW."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two log lines."})


def load_decoder(
    arguments: DecoderArguments,
    training: TrainingArguments,
    attention: str,
    stop: Callable[[str], NoReturn],
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model in float32 with an attention implementation, optionally with LoRA, and its tokenizer."""
    try:
        with training.main_process_first(desc="model"):
            name = arguments.model_name_or_path or str(smollm2_folder())
    except (AssetError, ImportError) as error:
        raise stop(f"{error}") from error
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation=attention)
    if arguments.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=arguments.lora_rank, task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(name)


def train_and_save(trainer: transformers.Trainer, report: Mapping[str, Any]) -> None:
    """Train, save, and write what was measured before into `report.json`; with a card."""
    arguments = trainer.args
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if arguments.should_save:
        with written_whole(Path(arguments.output_dir, "report.json")) as part:
            part.write_text(json.dumps(report, indent=2), encoding="utf-8")
    if arguments.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
