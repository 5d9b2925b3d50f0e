#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train, fine-tune or evaluate OAT, which predicts in which order people look at objects while searching for one.

A small model from scratch on generated shelves, against a random walk and a saliency baseline; some minutes on two cores:

    python scripts/run_scanpaths.py --output_dir out

The published sizes on the published data (the STI dataset of book covers, the authors' shelves), or on trials of your own:

    python scripts/run_scanpaths.py --variant amazon --amazon_annotations Amazon.json --image_dir covers --output_dir amazon
    python scripts/run_scanpaths.py --variant yogurt --shelf_table yogurt.csv --image_dir Question --output_dir yogurt
    python scripts/run_scanpaths.py --model_name_or_path amazon --trials my_trials.jsonl --output_dir mine

A line of `my_trials.jsonl` is `{"image": "shelf.png", "boxes": [[x1, y1, x2, y2], ...], "target_index": 5, "fixations": [[x, y], ...]}`.

Trials are split by image, 80/10/10, so that the splits have no images in common. Training stops when the behavioural distance (delta) of greedy
scanpaths on the validation images has not improved for `--patience` epochs, and the best checkpoint is kept. The test images give the
table: the greedy scanpath, the mean of `--num_samples` sampled ones, and the baselines. Drawings of true and predicted
scanpaths are in `output_dir/drawings`.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import EarlyStoppingCallback, set_seed
from transformers.utils import logging

from hf_attn.analysis.scanpaths import ScanpathMetrics
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.oat.baselines import random_walk, saliency_walk
from hf_attn.modeling.oat.configuration_oat import OATConfig
from hf_attn.modeling.oat.drawing import draw_scanpath
from hf_attn.modeling.oat.evaluation import (
    baseline_predictions,
    evaluate_predictions,
    predict_scanpaths,
    teacher_forced_similarity,
)
from hf_attn.modeling.oat.generated_scenes import SceneGenerator
from hf_attn.modeling.oat.modeling_oat import OATForScanpathPrediction
from hf_attn.modeling.oat.processing_oat import OATImageProcessor, collate_scenes
from hf_attn.modeling.oat.readers import read_amazon, read_shelves, read_trials
from hf_attn.modeling.oat.trials import ScanpathDataset, Trial, split_by_image, without_outliers
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, run_script, settings_of, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin
from hf_attn.training.writing import written_whole


NAME = "run_scanpaths.py"
stop = partial(command_line.stop, NAME)


#: a model from scratch for the generated shelves
SMALL = {
    "crop_height": 24,
    "crop_width": 24,
    "pyramid_levels": 2,
    "hidden_size": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "dropout": 0.0,
}


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further: folder or Hub id."}
    )
    variant: str | None = field(
        default=None, metadata={"help": f"Published size for a model from scratch: {', '.join(OATConfig.variants)}."}
    )


@dataclass
class DataArguments:
    """Arguments of the data; generated shelves if no data is given."""

    amazon_annotations: str | None = field(default=None, metadata={"help": "Amazon.json of the STI dataset."})
    amazon_boxes: str | None = field(
        default=None, metadata={"help": "JSON file that maps image names to boxes. Default: a plain grid of 6 x 14."}
    )
    shelf_table: list[str] = field(
        default_factory=list,
        metadata={"help": "Tables (CSV or Excel) of the authors' shelves, with one row per fixation."},
    )
    image_dir: str | None = field(default=None, metadata={"help": "Folder with the images of the dataset."})
    trials: str | None = field(default=None, metadata={"help": "JSON Lines file with your own trials, see above."})
    num_images: int = field(default=500, metadata={"help": "Number of generated shelves."})
    searches: int = field(default=4, metadata={"help": "Simulated searches per shelf."})
    num_samples: int = field(default=20, metadata={"help": "Sampled scanpaths per test image (paper: 100)."})
    num_drawings: int = field(default=4, metadata={"help": "Number of test images for which scanpaths are drawn."})


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with the paper's recipe for published sizes; both trains and evaluates by default."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-4 as published, 1e-3 for the small model."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm for clipping."})
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Scanpaths per device and step."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Default: 500 as published, 14 for the small model."}
    )
    patience: int = field(
        default=30, metadata={"help": "Number of epochs without a better delta after which training stops."}
    )
    seed: int = field(default=1234, metadata={"help": "Seed of the split, the model and the generated shelves."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two log lines."})


def parse_arguments(arguments: list[str] | None) -> tuple[ModelArguments, DataArguments, ScriptTrainingArguments]:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME, (ModelArguments, DataArguments, ScriptTrainingArguments), arguments, __doc__
    )
    if model_args.model_name_or_path is not None and model_args.variant is not None:
        raise stop("--variant is for models from scratch and cannot be used with --model_name_or_path")
    if model_args.variant not in (None, *OATConfig.variants):
        raise stop(f"--variant {model_args.variant} is not one of {', '.join(OATConfig.variants)}")
    sources = [bool(source) for source in (data_args.amazon_annotations, data_args.shelf_table, data_args.trials)]
    if sum(sources) > 1:
        raise stop("pass one of --amazon_annotations, --shelf_table, --trials")
    if any(sources[:2]) and data_args.image_dir is None:
        raise stop("--image_dir, the folder with the images, is missing")
    if any(sources) and model_args.variant is None and model_args.model_name_or_path is None:
        raise stop("pass --variant or --model_name_or_path")
    published = model_args.variant is not None or model_args.model_name_or_path is not None
    if training_args.learning_rate is None:
        training_args.learning_rate = 1e-4 if published else 1e-3
    if training_args.num_train_epochs is None:
        training_args.num_train_epochs = 500 if published else 14
    training_args.eval_strategy = training_args.save_strategy = "epoch"
    training_args.load_best_model_at_end = True
    training_args.metric_for_best_model, training_args.greater_is_better = "delta", False
    training_args.save_total_limit = training_args.save_total_limit or 2
    training_args.remove_unused_columns = False
    training_args.label_names = ["labels"]
    command_line.prepare_run(NAME, training_args)
    return model_args, data_args, training_args


def load_trials(data_args: DataArguments, seed: int) -> list[Trial]:
    """All trials, without the scanpaths that are much longer than the others."""
    try:
        if data_args.amazon_annotations is not None:
            trials = read_amazon(data_args.amazon_annotations, data_args.image_dir, data_args.amazon_boxes)
        elif data_args.shelf_table:
            trials = [trial for table in data_args.shelf_table for trial in read_shelves(table, data_args.image_dir)]
        elif data_args.trials is not None:
            trials = read_trials(data_args.trials)
        else:
            return SceneGenerator().trials(data_args.num_images, data_args.searches, seed)
    except (ValueError, OSError, ImportError) as error:
        raise stop(str(error)) from error
    return without_outliers(trials)


def make_model(model_args: ModelArguments, train_trials: list[Trial]) -> OATForScanpathPrediction:
    """The model to train; a new one stops after as many fixations as the longest scanpath of the training."""
    if model_args.model_name_or_path is not None:
        return OATForScanpathPrediction.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    longest = max(len(trial.scanpath) for trial in train_trials)
    if model_args.variant is not None:
        return OATForScanpathPrediction(OATConfig.from_variant(model_args.variant, max_scanpath_length=longest))
    rows, columns = train_trials[0].grid
    return OATForScanpathPrediction(
        OATConfig(**SMALL, num_rows=rows, num_columns=columns, max_scanpath_length=longest)
    )


class ScanpathTrainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Evaluates greedy scanpaths: predictions are objects, with -1 where a scanpath has ended."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels, num_objects = inputs["labels"], inputs["pixel_values"].shape[1]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
            scenes = {name: tensor for name, tensor in inputs.items() if name != "labels"}
            ids = self.accelerator.unwrap_model(model).generate(**scenes)[:, 1:]
        return loss, self._objects(ids, num_objects), (self._objects(labels, num_objects), inputs["target_index"])

    @staticmethod
    def _objects(ids: torch.Tensor, num_objects: int) -> torch.Tensor:
        return ids.masked_fill((ids >= num_objects) | (ids < 0), -1)


def evaluate(
    model: OATForScanpathPrediction, dataset: ScanpathDataset, data_args: DataArguments, seed: int
) -> dict[str, dict[str, float]]:
    """The table of the test images: way of predicting -> metric -> value."""
    trials, generator = dataset.trials, np.random.default_rng(seed)
    length = model.config.max_scanpath_length
    baselines = {
        "random walk": partial(random_walk, max_length=length, generator=generator),
        "saliency": partial(saliency_walk, max_length=length, generator=generator, processor=dataset.processor),
    }
    predictions = {
        "model, greedy": predict_scanpaths(model, dataset),
        "model, sampled": predict_scanpaths(model, dataset, data_args.num_samples),
        **{name: baseline_predictions(trials, walk, data_args.num_samples) for name, walk in baselines.items()},
    }
    table = {name: evaluate_predictions(trials, scanpaths) for name, scanpaths in predictions.items()}
    table["model, greedy"]["sim"] = teacher_forced_similarity(model, dataset)
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(table.values())))
    width = max(map(len, table))
    print(f"{'metric':24}" + "".join(f"{way:>{width + 2}}" for way in table))
    for name in names:
        values = [f"{row[name]:.3f}" if name in row else "" for row in table.values()]
        print(f"{name:24}" + "".join(f"{value:>{width + 2}}" for value in values))


def draw_scanpaths(model: OATForScanpathPrediction, dataset: ScanpathDataset, folder: Path, number: int) -> None:
    """Draw the scanpath of a person and the prediction side by side, enlarged to at least 600 pixels."""
    from PIL import Image

    first = {trial.image_id: trial for trial in reversed(dataset.trials)}
    chosen = ScanpathDataset(list(first.values())[:number], dataset.processor)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (trial, (scanpath, *_)) in enumerate(zip(chosen.trials, predict_scanpaths(model, chosen), strict=True)):
        pixels = (dataset.processor.read_image(trial.image) * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels)
        scale = max(1, -(-600 // image.width))
        image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
        pair = [
            draw_scanpath(image, scale * trial.boxes, path, trial.target_index) for path in (trial.scanpath, scanpath)
        ]
        both = Image.new("RGB", (2 * image.width + 20, image.height), "white")
        both.paste(pair[0], (0, 0))
        both.paste(pair[1], (image.width + 20, 0))
        both.save(folder / f"{index}_true_and_predicted.png")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the script; returns the table of the test images."""
    model_args, data_args, training_args = parse_arguments(arguments)
    logging.set_verbosity(training_args.get_process_log_level())
    with training_folder(NAME, training_args, settings_of(model_args, data_args)):
        return train_and_evaluate(model_args, data_args, training_args)


def train_and_evaluate(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> dict[str, dict[str, float]]:
    """Train and evaluate; returns the table of the test images."""
    set_seed(training_args.seed)
    trials = load_trials(data_args, training_args.seed)
    try:
        parts = split_by_image(trials, seed=training_args.seed)
    except ValueError as error:
        raise stop(str(error)) from error
    model = make_model(model_args, parts[0])
    processor = OATImageProcessor.from_config(model.config)
    train, validation, test = (ScanpathDataset(part, processor, cached_images=data_args.num_images) for part in parts)
    if training_args.should_log:
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
        print(
            f"{len(train)} scanpaths to train on, {len(validation)} to validate, {len(test)} to test; the splits have "
            "no images in common"
        )

    trainer = ScanpathTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate_scenes,
        compute_metrics=ScanpathMetrics(),
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(training_args.patience)],
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)

    table = {}
    if training_args.do_eval and trainer.is_world_process_zero():
        table = evaluate(model.eval(), test, data_args, training_args.seed)
        print_table(table)
        folder = Path(training_args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "test_results.json") as part:
            part.write_text(json.dumps(table, indent=2), encoding="utf-8")
        draw_scanpaths(model, test, folder / "drawings", data_args.num_drawings)
    card = {"finetuned_from": model_args.model_name_or_path}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return table


if __name__ == "__main__":
    run_script(NAME, main)
