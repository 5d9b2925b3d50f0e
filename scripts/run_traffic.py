#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train GMAN to forecast the traffic of a road network.

On a synthetic ring of 12 sensors whose best possible forecast is known; a minute or two on two cores:

    python scripts/run_traffic.py --output_dir out

On METR-LA or PeMS-BAY (or any table of timestamps and sensors, CSV or HDF5), with the road graph or the vectors of the sensors:

    python scripts/run_traffic.py --data_file metr-la.h5 --spatial_embedding_file "SE(METR).txt" --variant gman_metr \\
        --per_device_train_batch_size 16 --output_dir out

    python scripts/run_traffic.py --data_file pems-bay.h5 --adjacency_file "Adj(PeMS).txt" --variant gman_pems --output_dir out

The recipe is that of the official code: Adam, a learning rate that falls by 0.7 every 5 epochs, batch normalisation that slows
down, and the weights of the best epoch on the validation part, which is the tenth between the first 70% and the last 20%.
See `--help` for the arguments of this script, and transformers' `TrainingArguments` for the others.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import EarlyStoppingCallback, pipeline, set_seed
from transformers.utils import logging

from hf_attn import GMANConfig, GMANForPrediction
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.gman.baselines import historical_average, last_value
from hf_attn.modeling.gman.data import (
    TrafficWindows,
    order_sensors,
    read_table,
    regular_grid,
    split_by_time,
    steps_per_day_of,
)
from hf_attn.modeling.gman.graph import read_adjacency, read_spatial_embedding, spectral_embedding
from hf_attn.modeling.gman.metrics import forecast_errors
from hf_attn.modeling.gman.training import BatchNormMomentumCallback, staircase_schedule
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, run_script, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin


NAME = "run_traffic.py"
stop = partial(command_line.stop, NAME)


VARIANTS = [name for name in GMANConfig.variants if name != "tiny"]


@dataclass
class DataArguments:
    """Arguments of the data; without a file, on a synthetic ring road."""

    data_file: str | None = field(
        default=None, metadata={"help": "CSV or HDF5 file: rows are timestamps, columns are sensors."}
    )
    adjacency_file: str | None = field(
        default=None,
        metadata={
            "help": "Road graph: text file with lines `from to weight` or with a matrix, or .npy file; nodes "
            "are indices of the columns."
        },
    )
    spatial_embedding_file: str | None = field(
        default=None,
        metadata={"help": "Sensor embeddings in the format of node2vec, instead of those computed from the graph."},
    )
    steps_per_day: int | None = field(
        default=None, metadata={"help": "Time steps per day. Default: derived from the distance of the rows."}
    )
    time_zone: str | None = field(default=None, metadata={"help": "Time zone of timestamps without one."})
    zeros_are_values: bool = field(
        default=False, metadata={"help": "Treat zeros as measurements (volumes at night), not as missing values."}
    )
    horizons: list[int] = field(
        default_factory=list, metadata={"help": "Forecast steps to print. Default: a quarter, a half and all of them."}
    )


@dataclass
class ModelArguments:
    """Arguments of the model; by default, for the synthetic data, one block of 4 heads of width 4."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further or to evaluate: folder or Hub id."}
    )
    variant: str | None = field(
        default=None, metadata={"help": f"Published size: {', '.join(VARIANTS)}.", "choices": VARIANTS}
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Past time steps. Default: 12; 6 for the synthetic data."}
    )
    prediction_length: int | None = field(
        default=None, metadata={"help": "Future time steps. Default: 12; 6 for the synthetic data."}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of blocks of encoder and decoder."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads."})
    head_dim: int | None = field(default=None, metadata={"help": "Dimension of each head."})
    causal: bool | None = field(default=None, metadata={"help": "Mask later steps in the temporal attention."})
    group_size: int | None = field(default=None, metadata={"help": "Sensors per group in group attention."})


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with other defaults; trains and evaluates unless --do_train or --do_eval is given."""

    learning_rate: float | None = field(default=None, metadata={"help": "Default: 1e-3; 3e-3 for the synthetic data."})
    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "Maximum number of epochs. Default: 1000 with early stopping; 5 for the synthetic data."},
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device in training."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Batch size per device in evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate on the validation data."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints."})
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints to keep in addition to the best one."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Load the best checkpoint at the end."})
    metric_for_best_model: str = field(default="loss", metadata={"help": "Metric that selects the best epoch."})
    patience: int = field(
        default=10, metadata={"help": "Number of epochs without a better validation loss after which training stops."}
    )


class Trainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Writes the model card of the family, and has the learning rate fall in stairs."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            batches = len(self.get_train_dataloader())
            steps_per_epoch = max(1, batches // self.args.gradient_accumulation_steps)
            self.lr_scheduler = staircase_schedule(optimizer or self.optimizer, steps_per_epoch)
        return self.lr_scheduler


def parse_arguments(arguments: list[str] | None) -> tuple[DataArguments, ModelArguments, ScriptTrainingArguments]:
    """Parse command line arguments.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    given: set[str] = set()

    # The default number of epochs depends on the data; the base class does not accept None.
    def defaults(arguments: list[str]) -> dict[str, float]:
        given.update(argument.split("=")[0] for argument in arguments)
        synthetic = "--data_file" not in given
        return {"learning_rate": 3e-3 if synthetic else 1e-3, "num_train_epochs": 5.0 if synthetic else 1000.0}

    classes = (DataArguments, ModelArguments, ScriptTrainingArguments)
    data_args, model_args, training_args = command_line.parse_arguments(NAME, classes, arguments, __doc__, defaults)
    # Evaluation in each epoch sets `do_eval`, so its value does not show whether the user set it.
    if not given & {"--do_train", "--do_eval", "--do_predict"}:
        training_args.do_train = training_args.do_eval = True
    if model_args.model_name_or_path is not None:
        others = [
            name for name, value in vars(model_args).items() if value is not None and name != "model_name_or_path"
        ]
        if others:
            raise stop(f"--model_name_or_path has its own {', '.join(others)}; leave them out")
        if data_args.adjacency_file or data_args.spatial_embedding_file:
            raise stop("--model_name_or_path has its own sensor embeddings; leave the files of the graph out")
    elif data_args.data_file is not None and (data_args.adjacency_file is None) == (
        data_args.spatial_embedding_file is None
    ):
        raise stop(
            "pass either --adjacency_file or --spatial_embedding_file, which describe the positions of the sensors"
        )
    if data_args.data_file is None and (data_args.adjacency_file or data_args.spatial_embedding_file):
        raise stop("the synthetic data have their own graph; files of a graph need --data_file")
    return data_args, model_args, training_args


def load_data(data_args: DataArguments):
    """The table with equal time steps, its steps per day and, for the synthetic data, their true parameters."""
    synthetic = None
    if data_args.data_file is None:
        from hf_attn.examples.synthetic_traffic import synthetic_traffic

        synthetic = synthetic_traffic()
        table = synthetic.speeds
    else:
        table = read_table(data_args.data_file)
    steps_per_day = data_args.steps_per_day or steps_per_day_of(table)
    return regular_grid(table, steps_per_day, data_args.time_zone), steps_per_day, synthetic


def make_model(
    data_args: DataArguments, model_args: ModelArguments, table, steps_per_day: int, synthetic
) -> GMANForPrediction:
    """A model for the sensors of the table, with the vectors that their graph gives them."""
    if model_args.model_name_or_path is not None:
        return GMANForPrediction.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    fields = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 4,
        "context_length": 6,
        "prediction_length": 6,
    }
    fields = fields if synthetic is not None and model_args.variant is None else {}
    chosen = {name: value for name, value in vars(model_args).items() if value is not None}
    variant = chosen.pop("variant", "gman_paper")
    config = GMANConfig.from_variant(
        variant,
        **{
            **fields,
            **chosen,
            "num_nodes": len(table.columns),
            "steps_per_day": steps_per_day,
            "null_value": None if data_args.zeros_are_values else 0.0,
            "sensor_ids": list(table.columns),
        },
    )
    if data_args.spatial_embedding_file is not None:
        embedding = read_spatial_embedding(data_args.spatial_embedding_file)
        config.spatial_embedding_dim = embedding.shape[1]
    else:
        adjacency = synthetic.adjacency if synthetic else read_adjacency(data_args.adjacency_file, config.num_nodes)
        embedding = spectral_embedding(adjacency, config.spatial_embedding_dim)
    model = GMANForPrediction(config)
    model.set_spatial_embedding(embedding)
    return model


def baselines(parts, config: GMANConfig) -> dict[str, np.ndarray]:
    """Forecasts of all windows of the test part without a model, `(windows, steps, sensors)`."""
    test = parts["test"]
    average = historical_average(parts["train"], test.index, config.steps_per_day, config.null_value)
    latest = last_value(test.to_numpy(), config.null_value)
    past, future = config.context_length, config.prediction_length
    windows = len(test) - past - future + 1
    # Sensors without any measurement so far.
    latest = np.where(np.isnan(latest), average, latest)
    return {
        "historical average": np.stack([average[first + past : first + past + future] for first in range(windows)]),
        "last value": np.repeat(latest[past - 1 : past - 1 + windows, None], future, axis=1),
    }


def print_errors(errors: dict[str, dict[str, np.ndarray]], horizons: list[int], best: np.ndarray | None) -> None:
    """A table of MAE / RMSE / MAPE, a row for each method and a column for each horizon."""
    columns = [f"step {horizon}" for horizon in horizons] + ["all steps"]
    print(f"{'MAE / RMSE / MAPE':20}" + "".join(f"{column:>24}" for column in columns))
    for name, values in errors.items():
        cells = [
            f"{values['mae'][i]:.2f} / {values['rmse'][i]:.2f} / {100 * values['mape'][i]:.2f}%"
            for i in [*(horizon - 1 for horizon in horizons), -1]
        ]
        print(f"{name:20}" + "".join(f"{cell:>24}" for cell in cells))
    if best is not None:
        cells = [f"{best[horizon - 1]:.2f}" for horizon in horizons] + [f"{best.mean():.2f}"]
        print(f"{'best possible MAE':20}" + "".join(f"{cell:>24}" for cell in cells))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the test part."""
    data_args, model_args, training_args = parse_arguments(arguments)
    logging.set_verbosity(training_args.get_process_log_level())
    with training_folder(NAME, training_args, command_line.settings_of(model_args, data_args)):
        return train_and_evaluate(data_args, model_args, training_args)


def train_and_evaluate(
    data_args: DataArguments, model_args: ModelArguments, training_args: ScriptTrainingArguments
) -> dict[str, float]:
    """Train and evaluate; returns the metrics of the test part."""
    set_seed(training_args.seed)
    try:
        table, steps_per_day, synthetic = load_data(data_args)
        model = make_model(data_args, model_args, table, steps_per_day, synthetic)
        config = model.config
        if config.sensor_ids is not None:
            table = order_sensors(table, config.sensor_ids)
        if steps_per_day != config.steps_per_day:
            raise ValueError(f"The model has {config.steps_per_day} steps per day, but the data have {steps_per_day}.")
        parts = split_by_time(table)
        windows = {
            name: TrafficWindows(part, steps_per_day, config.context_length, config.prediction_length)
            for name, part in parts.items()
        }
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise stop(f"{error}") from error
    if model_args.model_name_or_path is None:
        config.value_mean, config.value_std = windows["train"].statistics(config.null_value)
    horizons = data_args.horizons or sorted(
        {max(1, config.prediction_length // 4), max(1, config.prediction_length // 2), config.prediction_length}
    )
    if any(not 1 <= horizon <= config.prediction_length for horizon in horizons):
        raise stop(f"--horizons must be between 1 and {config.prediction_length}, got {horizons}")
    if training_args.should_log:
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {config.num_nodes} sensors")
        print(", ".join(f"{name}: {len(part):,} windows" for name, part in windows.items()))

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        callbacks=[BatchNormMomentumCallback(), EarlyStoppingCallback(training_args.patience)],
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)

    metrics = {}
    if training_args.do_eval or training_args.do_predict:
        predictions = trainer.predict(windows["test"])
        null_value = config.null_value
        forecasts = {"GMAN": predictions.predictions, **baselines(parts, config)}
        errors = {
            name: forecast_errors(values, predictions.label_ids, null_value) for name, values in forecasts.items()
        }
        for name, values in errors["GMAN"].items():
            metrics |= {f"test_{name}_step_{horizon}": float(values[horizon - 1]) for horizon in horizons}
            metrics[f"test_{name}"] = float(values[-1])
        if training_args.should_log:
            best = None if synthetic is None else synthetic.best_mae(config.prediction_length)
            print_errors(errors, horizons, best)
            draw(trainer.model, table, parts["test"], Path(training_args.output_dir))
        trainer.save_metrics("test", metrics)

    card = {"finetuned_from": model_args.model_name_or_path, "dataset_tags": None}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return metrics


def draw(model: GMANForPrediction, table, test, folder: Path) -> None:
    """Save a plot of a forecast in the middle of the test set, with the sensors to which it attends most."""
    pipe = pipeline("traffic-forecasting", model=model.eval())
    start = test.index[len(test) // 2]
    try:
        figure = pipe.plot(table, start=start, show_attention=model.config.group_size is None)
    except (ImportError, ValueError) as error:
        print(f"No forecast was plotted: {error}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "forecast.png")


if __name__ == "__main__":
    run_script(NAME, main)
