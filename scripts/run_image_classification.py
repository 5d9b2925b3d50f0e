#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train an image classifier of the catalogue, or a plain ViT, from scratch or from a checkpoint.

From scratch, on the 1,797 handwritten digits of scikit-learn; a small model, a few minutes on two cores:

    python scripts/run_image_classification.py --model_type shvit --output_dir out

A published size on a folder of images (`folder/train/<class>/*.jpg`, `folder/validation/...`) or a dataset of the Hub, on
several GPUs, with mixup and label smoothing, and the model pushed at the end:

    accelerate launch scripts/run_image_classification.py --model_type shvit --variant shvit_s1 --dataset_name folder \\
        --mixup_alpha 0.8 --cutmix_alpha 1.0 --label_smoothing_factor 0.1 --bf16 --output_dir out --push_to_hub

See `--help` for the arguments of this script, and transformers' `TrainingArguments` for the others.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BitImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_attn
from hf_attn.architectures.imaging import image_processor_for
from hf_attn.catalog import families
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.rmt.label_maps import TokenTargets
from hf_attn.modeling.rmt.token_labeling import mixed_token_labeling
from hf_attn.restoration.images import as_rgb
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, parse_overrides, run_script, settings_of, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin


try:
    import datasets
    from torchvision.transforms import v2

    from hf_attn.training.augmentation import Augmentation
    from hf_attn.training.top_accuracy import TopAccuracy, first_classes
except ImportError as error:
    raise SystemExit(
        "This script needs the extras `train` and `vision`: pip install 'hf_attn[train,vision]'"
    ) from error

NAME = "run_image_classification.py"
stop = partial(command_line.stop, NAME)

#: transformers' plain ViT, to compare with or to analyse, and the families of the catalogue
MODEL_TYPES = (
    "vit",
    *(family.model_type for family in families() if "AutoModelForImageClassification" in family.models),
)

#: sizes with which a model from scratch learns the digits in a few minutes on two cores; for other families and for
#: anything serious, say --variant or --config_overrides
SMALL = {
    "vit": {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "initializer_range": 0.1,
    },
    "shvit": {
        "image_size": 64,
        "hidden_sizes": [32, 64, 96],
        "depths": [1, 2, 2],
        "partial_dims": [8, 16, 24],
    },
    "tnt": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 96,
        "inner_hidden_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "inner_num_attention_heads": 2,
        "initializer_range": 0.1,
    },
    "rmt": {
        "image_size": 32,
        "hidden_sizes": [32, 48, 64, 96],
        "depths": [1, 1, 2, 1],
        "num_attention_heads": [2, 2, 4, 4],
        "projection_dim": 128,
    },
    "biformer": {
        "image_size": 32,
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "mlp_ratios": [2, 2],
        "n_win": 2,
        "topks": [2, -2],
        "head_dim": 16,
    },
    "ninformer": {
        "image_size": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "hidden_dropout_prob": 0.1,
    },
    "activator": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "hidden_dropout_prob": 0.1,
    },
    "path_ensemble": {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ensemble_scale": "channel",
        "initializer_range": 0.1,
    },
}


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further: folder or Hub id of any image classifier."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": f"Family to train from scratch: {', '.join(MODEL_TYPES)}."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "Published variant of the family, which sets its sizes."}
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the configuration, such as `image_size=96 depths=[1,1,2]`."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})


@dataclass
class DataArguments:
    """Arguments of the data; without a dataset, on the digits of scikit-learn."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Folder with one sub-folder of images per class, or Hub id of a dataset."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. Default: detected by its type."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the classes. Default: detected by its type."}
    )
    validation_split_percentage: int = field(
        default=20, metadata={"help": "Percentage of the images to hold out if there is no validation or test split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training images to use."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Number of evaluation images to use."})
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "Augmentation of training images: `none`; `shift` (by up to an eighth of their size); `photo` "
            "(random resized crop, horizontal flip, RandAugment). Default: `shift` for the digits, `photo` "
            "for other data.",
            "choices": ["none", "shift", "photo"],
        },
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup alpha; 0 for no mixup."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix alpha; 0 for no CutMix."})
    mix_tokens: bool = field(
        default=False,
        metadata={
            "help": "Train an RMT with token_labeling like its authors: the tokens of two images are mixed in one "
            "feature map, and each position has the label of its image. Replaces CutMix."
        },
    )
    label_maps: bool = field(
        default=False,
        metadata={
            "help": "With --mix_tokens: use a label map for each training image, as made by a teacher, which is cropped like the "
            "image: in the column `label_map`, or in a .npy or .pt file next to the image. Shape (height, width), "
            "(classes, height, width) or (2, k, height, width)."
        },
    )
    mix_ground_truth: bool = field(
        default=False, metadata={"help": "With --label_maps: mix the class of the image into its label map."}
    )


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with other defaults; trains and evaluates unless --do_train or --do_eval is given."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Default: 2e-3 from scratch, which is suitable for small models; 5e-5 from a checkpoint."},
    )
    num_train_epochs: float = field(default=30.0, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop the last training batch if it is smaller, because BatchNorm fails on a single image."},
    )
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints during training."})


class Trainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Writes the model card of the family, and trains on batches that mixup and CutMix have mixed.

    Args:
        train_collator: makes the batches of the training; those of the evaluation are made by `data_collator`.
        token_labeling: train with the loss of RMT's token labelling.
        mix_ground_truth: with the class of the image in the targets of the image.
    """

    def __init__(self, *args, train_collator, token_labeling: bool = False, mix_ground_truth: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator
        self.token_labeling, self.mix_ground_truth = token_labeling, mix_ground_truth

    def get_train_dataloader(self):
        data_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = data_collator

    def get_eval_dataloader(self, eval_dataset=None):
        # `dataloader_drop_last` is meant for the training; here it would leave images out of the metrics.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.token_labeling and model.training:
            loss, outputs = mixed_token_labeling(
                model,
                self.accelerator.unwrap_model(model),
                **inputs,
                label_smoothing=self.args.label_smoothing_factor,
                with_ground_truth=self.mix_ground_truth,
            )
            return (loss, outputs) if return_outputs else loss
        if inputs["labels"].ndim == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits, labels, label_smoothing=self.args.label_smoothing_factor
        )
        return (loss, outputs) if return_outputs else loss


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
        training_args.learning_rate = 5e-5 if model_args.model_name_or_path is not None else 2e-3
    if data_args.augmentation is None:
        data_args.augmentation = "shift" if data_args.dataset_name is None else "photo"
    training_args.remove_unused_columns = False  # images become pixel values when they are looked at
    command_line.prepare_run(NAME, training_args)
    return model_args, data_args, training_args


def _problem(model_args: ModelArguments, data_args: DataArguments) -> str | None:
    """The error in the arguments, None if there is none."""
    if (model_args.model_name_or_path is None) == (model_args.model_type is None):
        return "pass either --model_name_or_path or --model_type"
    if model_args.model_type not in (None, *MODEL_TYPES):
        return f"--model_type {model_args.model_type} is not one of {', '.join(MODEL_TYPES)}"
    if model_args.model_name_or_path is not None and (model_args.variant or model_args.config_overrides):
        return "--variant and --config_overrides cannot be used with the weights of --model_name_or_path"
    if data_args.mix_tokens and data_args.cutmix_alpha > 0:
        return "--mix_tokens and --cutmix_alpha both mix parts of images; use only one of them"
    if data_args.label_maps and (not data_args.mix_tokens or data_args.mixup_alpha > 0):
        return "--label_maps needs --mix_tokens and cannot be used with --mixup_alpha, which mixes other labels"
    if data_args.label_maps and (data_args.dataset_name is None or data_args.augmentation == "none"):
        return "--label_maps needs --dataset_name, and --augmentation shift or photo, which also crops the maps"
    if data_args.mix_ground_truth and not data_args.label_maps:
        return "--mix_ground_truth needs --label_maps"
    return None


# --- data ----------------------------------------------------------------------------------------------------------


def load_digits() -> datasets.Dataset:
    """The 8 x 8 images of scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((pixels * 255 / 16).astype(np.uint8)) for pixels in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)


def load_images(data_args: DataArguments, seed: int) -> datasets.DatasetDict:
    """Images and classes in the columns `image` and `label` of the splits `train` and `validation`."""
    name = data_args.dataset_name
    if name is None:
        splits = datasets.DatasetDict({"train": load_digits()})
    elif Path(name).is_dir():
        splits = datasets.load_dataset("imagefolder", data_dir=name)
    else:
        splits = datasets.load_dataset(name, data_args.dataset_config_name)
    if "train" not in splits:
        raise stop(f"{name} has no split 'train', only {', '.join(splits)}")
    columns = {
        "image": _column(splits["train"], data_args.image_column, datasets.Image, "image_column"),
        "label": _column(splits["train"], data_args.label_column, datasets.ClassLabel, "label_column"),
    }
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    if held_out is None:
        share = data_args.validation_split_percentage / 100
        _check_classes(splits["train"], columns["label"], share)
        parts = splits["train"].train_test_split(share, seed=seed, stratify_by_column=columns["label"])
        splits, held_out = parts, "test"
    splits = datasets.DatasetDict({"train": splits["train"], "validation": splits[held_out]})
    kept = [*columns.values(), *(["label_map"] if data_args.label_maps else [])]
    splits = datasets.DatasetDict(
        {
            split: rows.select_columns([name for name in kept if name in rows.column_names])
            for split, rows in splits.items()
        }
    )
    splits = splits.rename_columns({column: new for new, column in columns.items() if column != new})
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None:
            splits[split] = splits[split].shuffle(seed=seed).select(range(min(limit, len(splits[split]))))
    return splits


def _check_classes(images: datasets.Dataset, column: str, share: float) -> None:
    """Check that there are images of each class for training and for evaluation."""
    names = images.features[column].names
    counts = np.bincount(images[column], minlength=len(names))
    few = [f"{name} ({count})" for name, count in zip(names, counts.tolist(), strict=True) if count < 2]
    if few:
        raise stop(
            "there is no validation split, and no image can be held out from classes with fewer than 2 images: "
            f"{', '.join(few)}. Add images to these classes, leave them out, or use a folder with train/ and "
            "validation/."
        )
    held_out = int(np.ceil(share * len(images)))
    if min(held_out, len(images) - held_out) < len(names):
        raise stop(
            f"--validation_split_percentage {100 * share:g} of {len(images)} images does not leave an image of each "
            f"of the {len(names)} classes in both splits; change it, add images, or use a folder with train/ and "
            "validation/."
        )


def _column(images: datasets.Dataset, name: str | None, kind: type, argument: str) -> str:
    candidates = [column for column, feature in images.features.items() if isinstance(feature, kind)]
    if name is None and len(candidates) == 1:
        return candidates[0]
    if name in candidates:
        return name
    found = (
        f"there are {', '.join(candidates)}" if candidates else f"there is none in {', '.join(images.column_names)}"
    )
    raise stop(f"--{argument} must be a {kind.__name__} column; {found}")


def training_transform(processor: BaseImageProcessor, config: PreTrainedConfig, augmentation: str):
    """What becomes of a training image."""
    if augmentation == "none":
        return lambda image: (processor(image, return_tensors="pt")["pixel_values"][0], None)
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Augmentation(augmentation, size, processor.image_mean, processor.image_std)


def with_pixel_values(
    images: datasets.Dataset, transform, num_channels: int, token_targets: TokenTargets | None = None
) -> datasets.Dataset:
    """The dataset with each image transformed when it is looked at; `num_channels` 1 is greyscale."""
    mode = "L" if num_channels == 1 else "RGB"

    def apply(batch: dict) -> dict:
        # Decoded here for an error that names the file, and because `datasets` leaves images deeper than 8 bits to Pillow.
        decoded = [as_rgb(image["bytes"] or image["path"], image["path"]) for image in batch["image"]]
        results = [transform(image.convert(mode)) for image in decoded]
        inputs = {"pixel_values": [pixel_values for pixel_values, _ in results], "labels": batch["label"]}
        if token_targets is not None:
            maps = batch.get("label_map", [None] * len(results))
            paths = [image["path"] for image in batch["image"]]
            inputs["token_targets"] = [
                token_targets(*source, view[:4], view.mirrored)
                for (_, view), *source in zip(results, maps, paths, strict=True)
            ]
        return inputs

    return images.cast_column("image", datasets.Image(decode=False)).with_transform(apply)


def make_collator(data_args: DataArguments, num_labels: int):
    """Stacks images, and applies mixup or cutmix to a training batch if requested; one of both at random if both are."""
    mixers = [
        mixer(alpha=alpha, num_classes=num_labels)
        for mixer, alpha in ((v2.MixUp, data_args.mixup_alpha), (v2.CutMix, data_args.cutmix_alpha))
        if alpha > 0
    ]
    if not mixers:
        return default_data_collator
    mix = v2.RandomChoice(mixers)

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(examples)
        pixel_values, labels = mix(batch["pixel_values"], batch["labels"])
        return {"pixel_values": pixel_values, "labels": labels}

    return collate


# --- model ---------------------------------------------------------------------------------------------------------


def make_model(model_args: ModelArguments, names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model to train and how its images are prepared; `names` are those of the classes."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    attention = {"attn_implementation": model_args.attn_implementation}
    if model_args.model_name_or_path is not None:
        checkpoint = model_args.model_name_or_path
        model = AutoModelForImageClassification.from_pretrained(
            checkpoint, dtype=torch.float32, ignore_mismatched_sizes=True, **labels, **attention
        )
        return model, AutoImageProcessor.from_pretrained(checkpoint)

    config_class = type(AutoConfig.for_model(model_args.model_type))
    overrides = parse_overrides(NAME, model_args.config_overrides, config_class)
    if model_args.variant is not None:
        variants = getattr(config_class, "variants", {})
        if model_args.variant not in variants:
            raise stop(
                f"{model_args.model_type} has no variant {model_args.variant!r}; its "
                f"variants: {', '.join(variants) or 'none'}"
            )
        config = config_class.from_variant(model_args.variant, **labels, **overrides)
        processor = image_processor_for(config)
    else:
        config = config_class(**{**SMALL.get(model_args.model_type, {}), **labels, **overrides})
        # A family that is made from other models has no image processor of its own.
        official = image_processor_for(config) if hasattr(config, "crop_ratio") else ViTImageProcessor()
        # The images of small models are rarely photos with a margin to crop.
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        processor = BitImageProcessor(
            size={"height": height, "width": width},
            do_center_crop=False,
            do_convert_rgb=config.num_channels == 3,
            resample=official.resample,
            image_mean=official.image_mean,
            image_std=official.image_std,
        )
    model = AutoModelForImageClassification.from_config(config, **attention)
    if model_args.attn_implementation is not None:
        hf_attn.uses_attention(model, model_args.attn_implementation)
    return model, processor


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
        images = load_images(data_args, training_args.seed)
    model, processor = make_model(model_args, images["train"].features["label"].names)
    if data_args.mix_tokens and not getattr(model.config, "token_labeling", False):
        raise stop(
            "--mix_tokens is for an RMT with token_labeling: --variant rmt_s_token_label, or --config_overrides "
            "token_labeling=true"
        )
    train_transform = training_transform(processor, model.config, data_args.augmentation)
    eval_transform = training_transform(processor, model.config, "none")
    if training_args.should_log:
        print(
            f"{type(model).__name__}: {model.num_parameters():,} parameters, images of {model.config.image_size} pixels"
        )
        print(", ".join(f"{split}: {len(rows):,} images" for split, rows in images.items()))

    batch = training_args.train_batch_size * training_args.world_size
    if training_args.do_train and training_args.dataloader_drop_last and len(images["train"]) < batch:
        raise stop(
            f"there are {len(images['train'])} training images, fewer than one batch of {batch}, and an incomplete "
            "last batch is dropped; use a --per_device_train_batch_size of at most "
            f"{len(images['train']) // training_args.world_size}."
        )
    metric = TopAccuracy(keep_in_memory=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=with_pixel_values(
            images["train"],
            train_transform,
            model.config.num_channels,
            TokenTargets(model) if data_args.label_maps else None,
        ),
        eval_dataset=with_pixel_values(images["validation"], eval_transform, model.config.num_channels),
        processing_class=processor,
        data_collator=default_data_collator,
        train_collator=make_collator(data_args, model.config.num_labels),
        token_labeling=data_args.mix_tokens,
        mix_ground_truth=data_args.mix_ground_truth,
        compute_metrics=lambda evaluation: metric.compute(
            predictions=evaluation.predictions, references=evaluation.label_ids
        ),
        preprocess_logits_for_metrics=first_classes,
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
