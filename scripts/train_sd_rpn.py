#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train a region proposal network of SD-RPN on pseudo-labels; the base is run and not changed.

Without arguments about model and data, a network for a tiny random LLaVA learns to find the coloured square that a question
names, among others on textured noise; about three minutes on one core. It prints the IoU of the predicted boxes with the true
ones on held-out images, and draws examples into `output_dir/overlays`:

    python scripts/train_sd_rpn.py --output_dir out

The paper's recipe for LLaVA-1.5-7B on labels that scripts/make_sd_rpn_labels.py has made, on four GPUs:

    accelerate launch --num_processes 4 scripts/train_sd_rpn.py --model_name_or_path llava-hf/llava-1.5-7b-hf --bf16 true \\
        --labels labels/gqa/labels labels/ocr_vqa/labels --output_dir rpn-7b --push_to_hub true

The network ends up in `output_dir/rpn`. Started again with the same arguments the script continues where it was, and ends with
the same weights. Batch sizes, learning rate and so on are those of the paper for the base's type if they are not given.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)

from hf_attn.hub import write_model_card
from hf_attn.modeling.sd_rpn.evaluation import box_iou
from hf_attn.modeling.sd_rpn.generation import FocusedImage, SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from hf_attn.modeling.sd_rpn.planted import PlantedSquares, tiny_llava
from hf_attn.modeling.sd_rpn.regions import Box, llava_regions
from hf_attn.modeling.sd_rpn.training import RoiCollator, SdRpnTrainer
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import MachineArguments, run_script, training_folder
from hf_attn.training.stages import train_stage
from hf_attn.training.writing import written_whole


try:
    import datasets
    from PIL import Image, ImageDraw
except ImportError as error:
    raise SystemExit(
        "This script needs the extras `train` and `vision`: pip install 'hf_attn[train,vision]'"
    ) from error

NAME = "train_sd_rpn.py"
stop = partial(command_line.stop, NAME)

#: type of the base -> defaults of the paper's training, on four processes; "planted" is the task without data
RECIPES = {
    "llava": {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 16},
    "qwen2_5_vl": {"learning_rate": 1e-4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
    "planted": {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "max_steps": 2400, "save_steps": 400},
}
RECIPES["llava_next"] = RECIPES["llava"]

#: branch layer of the network for the tiny base, cells in a row of its map, and threshold: the target is what the mask covers
PLANTED_BRANCH, PLANTED_GRID, PLANTED_THRESHOLD = 2, 12, 0.5


@dataclass
class ModelArguments:
    """The base, and the network to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Base model: folder or Hub id of a LLaVA, LLaVA-Next or Qwen2.5-VL. Default: a tiny random LLaVA."
        },
    )
    rpn: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a region proposal network to train further, instead of a new one."},
    )
    branch_layer: int | None = field(
        default=None,
        metadata={"help": "Number of base layers before the network. Default: that of the paper for this base."},
    )
    num_rpn_layers: int = field(default=3, metadata={"help": "Number of layers of the network."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})


@dataclass
class DataArguments:
    """Arguments of the data."""

    labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Datasets of pseudo-labels: folders or Hub ids, which are concatenated. Required with "
            "--model_name_or_path."
        },
    )
    validation_size: int = field(default=64, metadata={"help": "Number of images to hold out."})
    num_overlays: int = field(
        default=8, metadata={"help": "Number of held-out images on which maps and boxes are drawn."}
    )
    num_planted: int = field(default=4800, metadata={"help": "Number of images of the synthetic task."})


@dataclass
class ScriptTrainingArguments(MachineArguments):
    """transformers' arguments with the paper's defaults; those that depend on the base are in `RECIPES`."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Adam's beta2."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two log lines."})
    save_steps: float = field(default=200, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Default: false, because every step uses all trained parameters."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


Arguments = tuple[ModelArguments, DataArguments, ScriptTrainingArguments]


def parse_arguments(arguments: list[str] | None) -> Arguments:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME,
        (ModelArguments, DataArguments, ScriptTrainingArguments),
        arguments,
        __doc__,
        lambda arguments: RECIPES[_kind_of_base(arguments)],
    )
    if (model_args.model_name_or_path is None) != (data_args.labels is None):
        raise stop(
            "--model_name_or_path and --labels must be used together; without both, the synthetic task is trained"
        )
    if model_args.rpn is not None and model_args.branch_layer is not None:
        raise stop("--branch_layer is for a new network; the network of --rpn has its own")
    if data_args.validation_size < data_args.num_overlays:
        raise stop("--num_overlays must be at most --validation_size")
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    return model_args, data_args, training_args


def _kind_of_base(arguments: list[str]) -> str:
    """The recipe that the arguments select."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--model_name_or_path")
    base = only.parse_known_args(arguments)[0].model_name_or_path
    if base is None:
        return "planted"
    try:
        kind = AutoConfig.from_pretrained(base).model_type
    except (OSError, ValueError) as error:
        raise stop(f"--model_name_or_path {base} cannot be loaded: {error}") from error
    if kind not in RECIPES:
        raise stop(
            f"--model_name_or_path {base} is a {kind!r}, but SD-RPN supports only {', '.join(sorted(set(RECIPES) - {'planted'}))}"
        )
    return kind


def settings_of(model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments) -> dict:
    """Settings that the resulting weights depend on."""
    training = command_line.training_settings_of(training_args, "adam_beta2")
    return {**command_line.settings_of(model_args, data_args), **training}


# --- model and data ------------------------------------------------------------------------------------------------


def load_base(
    model_args: ModelArguments, training_args: ScriptTrainingArguments
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base and its processor; the tiny one is kept in the output folder, for use with the network."""
    if model_args.model_name_or_path is None:
        base, processor = tiny_llava(PLANTED_GRID)
        folder = Path(training_args.output_dir, "base")
        if training_args.process_index == 0 and not folder.is_dir():
            with written_whole(folder) as part:
                base.save_pretrained(part)
                processor.save_pretrained(part)
        return base, processor
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    base = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path, dtype=dtype, attn_implementation=model_args.attn_implementation
    )
    return base, AutoProcessor.from_pretrained(model_args.model_name_or_path)


def make_rpn(model_args: ModelArguments, base: PreTrainedModel) -> SdRpnModel:
    """The network before its training, in full precision."""
    if model_args.rpn is not None:
        return SdRpnModel.from_pretrained(model_args.rpn, dtype=torch.float32)
    options = {"num_hidden_layers": model_args.num_rpn_layers}
    if model_args.model_name_or_path is None:
        options |= {"branch_layer": PLANTED_BRANCH, "thresholds": {"default": PLANTED_THRESHOLD}}
    if model_args.branch_layer is not None:
        options["branch_layer"] = model_args.branch_layer
    return SdRpnModel.from_base(base, **options).float()


def load_data(data_args: DataArguments, seed: int) -> tuple[Sequence, Sequence]:
    """Rows to train on and rows that are held out."""
    if data_args.labels is None:
        train = PlantedSquares(data_args.num_planted, PLANTED_GRID, seed=seed)
        return train, PlantedSquares(data_args.validation_size, PLANTED_GRID, seed=seed + 1)
    parts = []
    for name in data_args.labels:
        on_disk = Path(name, "state.json").is_file()
        part = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, split="train")
        missing = {"image", "question", "roi_labels"} - set(part.column_names)
        if missing:
            raise stop(
                f"--labels {name} has no {', '.join(sorted(missing))}; create labels by scripts/make_sd_rpn_labels.py"
            )
        parts.append(part.select_columns(["image", "question", "roi_labels"]))
    rows = datasets.concatenate_datasets(parts)
    if len(rows) <= data_args.validation_size:
        raise stop(
            f"--labels have {len(rows)} images, but must have more than --validation_size {data_args.validation_size}"
        )
    split = rows.train_test_split(data_args.validation_size, seed=seed)
    return split["train"], split["test"]


# --- evaluation ----------------------------------------------------------------------------------------------------


def look(generator: SdRpnGenerator, rows: Sequence, batch_size: int = 16) -> list[FocusedImage]:
    """Where the network looks in images, by the boxes of the two-pass inference."""
    found = []
    for start in tqdm(range(0, len(rows), batch_size), desc="looking", leave=False):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        focused = generator.prepare([row["question"] for row in batch], [row["image"] for row in batch])
        found += [image for (image,) in focused.images]
    return found


def target_boxes(row: dict) -> list[Box]:
    """The crop of the two-pass inference if the map were the target: the best possible result with whole cells."""
    target = (row["roi_labels"] == 1).float()
    regions = llava_regions(target, PLANTED_THRESHOLD, row["image"].size)
    return [region.box for region in regions]


def mean_iou(boxes: Sequence[Sequence[Box]], rows: Sequence) -> float:
    """Mean IoU of the predicted box of each image with the planted one; no box counts as zero."""
    ious = [box_iou(found[0], rows[i]["box"]) if found else 0.0 for i, found in enumerate(boxes)]
    return sum(ious) / len(ious)


def draw(found: FocusedImage, row: dict, side: int = 400) -> Image.Image:
    """The image next to its map and predicted boxes (green), above the question; a planted box is drawn in white."""
    image = found.image.convert("RGB")
    veiled = found.overlay()
    if "box" in row:
        left, top, right, bottom = row["box"]
        ImageDraw.Draw(veiled).rectangle((left, top, right - 1, bottom - 1), outline="white")
    scale = side / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    overlay = Image.new("RGB", (2 * size[0] + 10, size[1] + 24), "white")
    for i, part in enumerate((image, veiled)):
        overlay.paste(part.resize(size, Image.Resampling.NEAREST), (i * (size[0] + 10), 0))
    ImageDraw.Draw(overlay).text((4, size[1] + 6), row["question"].replace("\n", " "), fill="black")
    return overlay


def evaluate(
    base: PreTrainedModel,
    rpn: SdRpnModel,
    untrained: SdRpnModel,
    processor: ProcessorMixin,
    held_out: Sequence,
    args: Arguments,
) -> dict[str, float]:
    """Evaluate on the held-out images and draw some of them; the untrained network is evaluated as well."""
    model_args, data_args, training_args = args
    shown = held_out if model_args.model_name_or_path is None else held_out.select(range(data_args.num_overlays))
    found = look(SdRpnGenerator(base, rpn.eval(), processor), shown)
    metrics = {}
    if model_args.model_name_or_path is None:
        before = look(SdRpnGenerator(base, untrained.eval(), processor), held_out)
        metrics = {
            "mean_iou": mean_iou([image.boxes for image in found], held_out),
            "untrained_mean_iou": mean_iou([image.boxes for image in before], held_out),
            "target_mean_iou": mean_iou([target_boxes(row) for row in held_out], held_out),
        }
    folder = Path(training_args.output_dir, "overlays")
    folder.mkdir(exist_ok=True)
    for i in range(data_args.num_overlays):
        draw(found[i], shown[i]).save(folder / f"{i:02d}.png")
    return metrics


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns the metrics of the evaluation."""
    args = _, _, training_args = parse_arguments(arguments)
    with training_folder(NAME, training_args, settings_of(*args), continues=True):
        return train_and_evaluate(*args)


def train_and_evaluate(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> dict[str, float]:
    """Train, unless training is finished, and evaluate; returns the metrics of the evaluation."""
    args = model_args, data_args, training_args
    output = Path(training_args.output_dir)
    set_seed(training_args.seed)

    base, processor = load_base(model_args, training_args)
    rpn, untrained = make_rpn(model_args, base), make_rpn(model_args, base)
    train_rows, held_out = load_data(data_args, training_args.seed)
    trained = sum(parameter.numel() for parameter in rpn.parameters() if parameter.requires_grad)
    PartialState().print(
        f"{trained:,} trainable parameters, {len(train_rows)} images to train on, {len(held_out)} held out"
    )
    training_args.output_dir = str(output / "checkpoints")
    training_args.push_to_hub, push = False, training_args.push_to_hub
    trainer = SdRpnTrainer(
        model=rpn,
        args=training_args,
        base=base,
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=RoiCollator(processor, base.config),
    )
    folder = train_stage(trainer, output / "rpn")
    training_args.output_dir = str(output)

    rpn = SdRpnModel.from_pretrained(folder).to(training_args.device)
    trainer.model.load_state_dict(rpn.state_dict())
    metrics = {"eval_loss": trainer.evaluate()["eval_loss"]}
    if training_args.process_index == 0:
        metrics |= evaluate(base, rpn, untrained.to(training_args.device), processor, held_out, args)
        report(metrics, output, model_args, rpn, training_args)
        if push:
            name = training_args.hub_model_id or output.name
            rpn.push_to_hub(name, token=training_args.hub_token, private=training_args.hub_private_repo)
    PartialState().wait_for_everyone()
    return metrics


def report(
    metrics: dict[str, float],
    output: Path,
    model_args: ModelArguments,
    rpn: SdRpnModel,
    training_args: ScriptTrainingArguments,
) -> None:
    """Print the metrics, and keep them in a file and in the model card."""
    for name, value in metrics.items():
        print(f"{name.replace('_', ' '):20}{value:8.3f}")
    with written_whole(output / "eval_results.json") as part:
        part.write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    training = {
        name: getattr(training_args, name)
        for name in ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    }
    write_model_card(
        output / "rpn", rpn, base_model=model_args.model_name_or_path, evaluation=metrics, training=training
    )
    print(f"The network was saved to {output / 'rpn'}, and overlays of its maps and boxes to {output / 'overlays'}.")


if __name__ == "__main__":
    run_script(NAME, main)
