#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train and evaluate the classifier of speech and transcripts (arXiv 2305.16406) over several seeds.

Small encoders from scratch on synthetic recordings whose class depends on both sound and words, 15 trainings of half a minute:

    python scripts/run_speech_classification.py --output_dir out

Pretrained encoders on recordings of your own:

    python scripts/run_speech_classification.py --table adress.csv --text_model google-bert/bert-base-uncased \\
        --vision_model facebook/deit-base-patch16-224 --lora_rank 8 --output_dir adress

`adress.csv` has the columns `audio`, `label`, `speaker`, and `text` or `transcript` (a file, `.cha` or plain text). Recordings are split by
speaker, 70/15/15, the same way for all seeds; training stops when the validation loss has not improved for `--patience` epochs. With
`--modalities both text audio` the same network is also trained without one of its inputs. The table has the mean and the standard deviation
over seeds; `output_dir` gets `results.json`, the reliability diagram of the test speakers, and the model with the best validation loss,
whose `temperature` in `results.json` is fitted on the validation speakers.

Not a diagnostic device: see the model card.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    DeiTConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import is_peft_available, logging

from hf_attn.analysis.calibration import ClassificationMetrics, fit_temperature, plot_reliability
from hf_attn.analysis.calibration.metrics import softmax
from hf_attn.examples.synthetic_speech import (
    BEST_ALONE,
    BEST_TOGETHER,
    SAMPLING_RATE,
    synthetic_recordings,
    word_tokenizer,
)
from hf_attn.modeling.dementia_fusion.configuration_dementia_fusion import CHOICES, DementiaFusionConfig
from hf_attn.modeling.dementia_fusion.data import (
    MODALITIES,
    Recording,
    SpeechCollator,
    SpeechDataset,
    read_table,
    split_by_speaker,
)
from hf_attn.modeling.dementia_fusion.modeling_dementia_fusion import DementiaFusionForClassification
from hf_attn.modeling.dementia_fusion.processing_dementia_fusion import (
    DementiaFusionProcessor,
    SpeechImageFeatureExtractor,
)
from hf_attn.modeling.dementia_fusion.training import TwoRatesTrainer
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import MachineArguments, run_script, settings_of, training_folder
from hf_attn.training.writing import written_whole


NAME = "run_speech_classification.py"


SMALL_ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL_IMAGE = 64


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further, with its processor."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Pretrained encoder for transcripts."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Pretrained encoder for spectrograms, with the same hidden size."}
    )
    intra: str = field(
        default="context", metadata={"help": "Attention within a modality.", "choices": CHOICES["intra"]}
    )
    context: str = field(default="global", metadata={"help": "Context of the tokens.", "choices": CHOICES["context"]})
    cross: str = field(
        default="sinkhorn", metadata={"help": "Transport between modalities.", "choices": CHOICES["cross"]}
    )
    fusion: str = field(default="attention", metadata={"help": "Fusion of the streams.", "choices": CHOICES["fusion"]})
    loss_smoothing: float = field(default=0.1, metadata={"help": "Label smoothing of the model's own loss."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "LoRA rank for the encoders. Default: all their weights are trained."}
    )


@dataclass
class DataArguments:
    """Arguments of the data; synthetic recordings if there is no table."""

    table: str | None = field(default=None, metadata={"help": "CSV file with the recordings, see above."})
    truncation: bool = field(default=False, metadata={"help": "Truncate transcripts that are too long."})
    mix_channels: bool = field(default=False, metadata={"help": "Average the channels of multi-channel recordings."})
    num_speakers: int = field(
        default=400, metadata={"help": "Number of synthetic speakers, with two recordings each."}
    )
    modalities: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Modalities to train on, out of {', '.join(MODALITIES)}. Default: both, or all for "
            "synthetic recordings."
        },
    )


@dataclass
class ScriptTrainingArguments(MachineArguments):
    """transformers' arguments; `learning_rate` is that of the encoders."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the encoders. Default: 1e-5 if pretrained (1e-4 with LoRA), 1e-3 from scratch."
        },
    )
    head_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the layers after the encoders."}
    )
    num_train_epochs: float = field(default=20, metadata={"help": "Epochs at most."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Recordings per device and step."})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Recordings per device and evaluation step."}
    )
    num_seeds: int = field(
        default=5, metadata={"help": "Number of training runs, with consecutive seeds starting at `seed`."}
    )
    patience: int = field(
        default=4, metadata={"help": "Number of epochs without a better validation loss after which training stops."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


def stop(message: str) -> SystemExit:
    return command_line.stop(NAME, message)


def parse_arguments(arguments: list[str] | None) -> tuple[ModelArguments, DataArguments, ScriptTrainingArguments]:
    """Parse command line arguments.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME, (ModelArguments, DataArguments, ScriptTrainingArguments), arguments, __doc__
    )
    pretrained = (model_args.text_model, model_args.vision_model)
    if any(pretrained) != all(pretrained):
        raise stop("pass both --text_model and --vision_model, with the same hidden size")
    if all(pretrained) and model_args.model_name_or_path:
        raise stop("pass either --model_name_or_path, or --text_model and --vision_model")
    starts = bool(model_args.model_name_or_path) or all(pretrained)
    if starts != bool(data_args.table):
        raise stop(
            "pretrained models and --table must be used together; without both, a small model is trained on "
            "synthetic recordings"
        )
    unknown = set(data_args.modalities) - set(MODALITIES)
    if unknown:
        raise stop(f"--modalities must be out of {', '.join(MODALITIES)}, got {', '.join(data_args.modalities)}")
    if not data_args.modalities:
        data_args.modalities = ["both"] if data_args.table else list(MODALITIES)
    if training_args.resume_from_checkpoint:
        raise stop("runs with several seeds cannot be resumed; use --overwrite_output_dir to start a new run")
    if training_args.num_seeds < 1:
        raise stop(f"--num_seeds must be at least 1, got {training_args.num_seeds}")
    if model_args.lora_rank and not is_peft_available():
        raise stop("--lora_rank needs peft: pip install 'hf_attn[peft]'")
    if training_args.label_smoothing_factor:
        raise stop("the model has its own label smoothing: use --loss_smoothing instead of --label_smoothing_factor")
    if training_args.learning_rate is None:
        training_args.learning_rate = (1e-4 if model_args.lora_rank else 1e-5) if starts else 1e-3
    training_args.eval_strategy = training_args.save_strategy = "epoch"
    training_args.save_total_limit = 1
    training_args.load_best_model_at_end = True
    training_args.metric_for_best_model, training_args.greater_is_better = "loss", False
    training_args.remove_unused_columns = False
    training_args.label_names = ["labels"]
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    return model_args, data_args, training_args


def load_recordings(data_args: DataArguments, seed: int) -> tuple[list[Recording], list[str]]:
    """The recordings and the names of their classes."""
    if data_args.table is None:
        made_up = synthetic_recordings(data_args.num_speakers, seed=seed)
        return [
            Recording({"array": one.samples, "sampling_rate": SAMPLING_RATE}, one.text, one.label, one.speaker)
            for one in made_up
        ], ["negative", "positive"]
    try:
        return read_table(data_args.table)
    except (ValueError, OSError) as error:
        raise stop(str(error)) from error


def make_processor(model_args: ModelArguments, data_args: DataArguments) -> DementiaFusionProcessor:
    if model_args.model_name_or_path:
        processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
        processor.feature_extractor.mix_channels |= data_args.mix_channels
        return processor
    if model_args.text_model is None:
        size = {"height": SMALL_IMAGE, "width": SMALL_IMAGE}
        return DementiaFusionProcessor(SpeechImageFeatureExtractor(size=size), word_tokenizer())
    extractor = SpeechImageFeatureExtractor(mix_channels=data_args.mix_channels)
    return DementiaFusionProcessor(extractor, AutoTokenizer.from_pretrained(model_args.text_model))


def make_model(model_args: ModelArguments, processor: DementiaFusionProcessor, classes: list[str]) -> PreTrainedModel:
    """A new model; its random weights are those of the seed."""
    fields = {name: getattr(model_args, name) for name in ("intra", "context", "cross", "fusion")}
    fields["label_smoothing"] = model_args.loss_smoothing
    fields |= {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    if model_args.model_name_or_path:
        model = DementiaFusionForClassification.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
        if list(model.config.label2id) != classes:
            raise stop(
                f"the checkpoint has the classes {', '.join(model.config.label2id)}, but the table has "
                f"{', '.join(classes)}"
            )
    elif model_args.text_model:
        model = DementiaFusionForClassification.from_text_vision_pretrained(
            model_args.text_model, model_args.vision_model, **fields
        )
    else:
        text = BertConfig(vocab_size=len(processor.tokenizer), max_position_embeddings=64, **SMALL_ENCODER)
        vision = DeiTConfig(image_size=SMALL_IMAGE, patch_size=16, **SMALL_ENCODER)
        return DementiaFusionForClassification(DementiaFusionConfig(text_config=text, vision_config=vision, **fields))
    if model_args.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=model_args.lora_rank, lora_alpha=2 * model_args.lora_rank, modules_to_save=["interaction", "head"]
        )
        model = get_peft_model(model, adapters)
    return model


def train(
    model_args: ModelArguments,
    training_args: ScriptTrainingArguments,
    processor: DementiaFusionProcessor,
    parts: list[SpeechDataset],
    classes: list[str],
    modality: str,
    seed: int,
) -> dict:
    """Train once; returns the model, its validation loss, the temperature, logits and measures of the test speakers."""
    set_seed(seed)
    arguments = ScriptTrainingArguments(
        **{
            **{
                name: getattr(training_args, name)
                for name, entry in training_args.__dataclass_fields__.items()
                if entry.init
            },
            "seed": seed,
            "output_dir": str(Path(training_args.output_dir) / f"{modality}_seed{seed}"),
        }
    )
    trainer = TwoRatesTrainer(
        model=make_model(model_args, processor, classes),
        args=arguments,
        train_dataset=parts[0],
        eval_dataset=parts[1],
        data_collator=SpeechCollator(processor, modality),
        compute_metrics=ClassificationMetrics(),
        head_learning_rate=training_args.head_learning_rate,
        callbacks=[EarlyStoppingCallback(training_args.patience)],
    )
    trainer.train()
    validation, test = (trainer.predict(part) for part in parts[1:])
    temperature = fit_temperature(validation.predictions, validation.label_ids)
    probabilities = softmax(test.predictions)
    measures = ClassificationMetrics().compute(probabilities, test.label_ids)
    scaled = ClassificationMetrics().compute(softmax(test.predictions / temperature), test.label_ids)
    measures |= {f"{name}_scaled": scaled[name] for name in ("ece", "ace", "brier")}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "model": model.merge_and_unload() if model_args.lora_rank else model,
        "loss": validation.metrics["test_loss"],
        "temperature": temperature,
        "probabilities": probabilities,
        "labels": test.label_ids,
        "measures": measures,
    }


def summarize(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each measure over seeds."""
    names = runs[0]["measures"]
    values = {name: np.array([run["measures"][name] for run in runs]) for name in names}
    return {
        name: {"mean": float(row.mean()), "std": float(row.std(ddof=1)) if len(row) > 1 else float("nan")}
        for name, row in values.items()
    }


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'measure':14}" + "".join(f"{modality:>18}" for modality in table))
    for name in next(iter(table.values())):
        cells = [_cell(**row[name]) for row in table.values()]
        print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells))


def _cell(mean: float, std: float) -> str:
    return f"{mean:.3f}" if np.isnan(std) else f"{mean:.3f} +- {std:.3f}"


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Run the script; returns the table, modality -> measure -> mean and standard deviation."""
    model_args, data_args, training_args = parse_arguments(arguments)
    logging.set_verbosity(training_args.get_process_log_level())
    with training_folder(NAME, training_args, settings_of(model_args, data_args)):
        return train_and_evaluate(model_args, data_args, training_args)


def train_and_evaluate(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> dict[str, dict[str, dict[str, float]]]:
    """Train all seeds and modalities; returns the table."""
    recordings, classes = load_recordings(data_args, training_args.seed)
    processor = make_processor(model_args, data_args)
    try:
        split = split_by_speaker(recordings, seed=training_args.seed)
        parts = [SpeechDataset(part, processor, data_args.truncation) for part in split]
    except (ValueError, ImportError) as error:
        raise stop(str(error)) from error
    if training_args.should_log:
        train_size, validation_size, test_size = map(len, parts)
        print(
            f"{train_size} recordings to train on, {validation_size} to validate, {test_size} to test; the splits "
            "have no speakers in common"
        )

    table, best = {}, None
    for modality in data_args.modalities:
        runs = []
        for seed in range(training_args.seed, training_args.seed + training_args.num_seeds):
            runs.append(train(model_args, training_args, processor, parts, classes, modality, seed))
            if modality == data_args.modalities[0] and (best is None or runs[-1]["loss"] < best["loss"]):
                best = runs[-1]
            runs[-1] = {name: value for name, value in runs[-1].items() if name != "model"}
        table[modality] = summarize(runs)
    if training_args.should_save:
        folder = Path(training_args.output_dir)
        best["model"].save_pretrained(folder)
        processor.save_pretrained(folder)
        results = {"table": table, "temperature": best["temperature"], "num_seeds": training_args.num_seeds}
        # Undefined values are null, because JSON has no NaN.
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)
        with written_whole(folder / "results.json") as part:
            part.write_text(json.dumps(results, indent=2), encoding="utf-8")
        try:
            plot_reliability(best["probabilities"], best["labels"]).savefig(folder / "reliability.png")
        except ImportError as error:
            print(error)
    if training_args.should_log:
        print_table(table)
        if data_args.table is None:
            print(f"best possible accuracy: {BEST_ALONE} with one modality, {BEST_TOGETHER} with both")
    return table


if __name__ == "__main__":
    run_script(NAME, main)
