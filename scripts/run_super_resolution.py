#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Train, fine-tune or evaluate a model for image super-resolution: HAT, DRCT, or any of `AutoModelForImageToImage` with a loss.

A small HAT for scale 2 from scratch, on photographs of scikit-learn and scikit-image; three minutes on two cores:

    python scripts/run_super_resolution.py --model_type hat --scale 2 --output_dir out --max_steps 4000

A published size by a published recipe, on a folder of images, and then scale 4 from scale 2:

    torchrun --nproc_per_node 8 scripts/run_super_resolution.py --model_type hat --variant hat_x2 --recipe scratch \\
        --train_dir DF2K/HR --validation_dir Set5 --per_device_train_batch_size 4 --output_dir hat_x2
    torchrun --nproc_per_node 8 scripts/run_super_resolution.py --model_name_or_path hat_x2 --scale 4 --recipe x4_from_x2 \\
        --train_dir DF2K/HR --validation_dir Set5 --per_device_train_batch_size 4 --output_dir hat_x4

Real photographs: first the distance to sharpened photographs, then the adversarial stage with VGG's perceptual loss:

    torchrun --nproc_per_node 8 scripts/run_super_resolution.py --model_type hat --variant hat_x4 --recipe real \\
        --train_dir DF2K/HR --per_device_train_batch_size 4 --output_dir real
    python -c "import torch, torchvision as t; torch.save(t.models.vgg19(weights='IMAGENET1K_V1').state_dict(), 'vgg19.pth')"
    torchrun --nproc_per_node 8 scripts/run_super_resolution.py --model_name_or_path real --recipe real_gan \\
        --perceptual_weights vgg19.pth --train_dir DF2K/HR --per_device_train_batch_size 4 --output_dir real_gan

Low-resolution images are made as in the papers: MATLAB's bicubic down-scaling, rounded to 8 bits, or by the recipes for real
photographs Real-ESRGAN's second-order degradation. The evaluation prints PSNR and SSIM (Y channel, without a border as wide
as the scale) of the averaged weights, and of bicubic enlargement.

Left out: the queue from which the published training draws its degraded batches. Here each patch has a degradation of its own.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageToImage,
    PreTrainedModel,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_attn  # noqa: F401
from hf_attn.architectures.restoration.warm_start import start_as_interpolation
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.catalog import families
from hf_attn.examples.photographs import load_photographs
from hf_attn.hub import HubTrainerMixin
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, parse_overrides, run_script, settings_of, training_folder
from hf_attn.training.evaluation import ExactEvaluationMixin
from hf_attn.training.writing import written_whole


try:
    from hf_attn.restoration.adversarial import PerceptualLoss, UNetDiscriminator
    from hf_attn.restoration.adversarial_training import AdversarialTrainerMixin
    from hf_attn.restoration.metrics import RestorationMetrics
    from hf_attn.restoration.pairs import DEGRADATIONS, Images, Patches, WholeImages
    from hf_attn.restoration.resize import bicubic_resize
except ImportError as error:
    raise SystemExit("This script needs the extra `vision`: pip install 'hf_attn[vision]'") from error


NAME = "run_super_resolution.py"
stop = partial(command_line.stop, NAME)

logger = logging.get_logger("run_super_resolution")

MODEL_TYPES = tuple(family.model_type for family in families() if "AutoModelForImageToImage" in family.models)

#: default configuration of a model from scratch, as far as its class has these fields
SMALL = {
    "embed_dim": 24,
    "depths": [2],
    "num_heads": [2],
    "window_size": 8,
    "compress_ratio": 4,
    "squeeze_factor": 8,
    "growth_channels": 8,
}

#: name -> (steps, learning rate, steps after which it is halved) of the published trainings; the first four are at a total
#: batch of 32
RECIPES = {
    "scratch": (500_000, 2e-4, (250_000, 400_000, 450_000, 475_000)),
    "x4_from_x2": (250_000, 1e-4, (125_000, 200_000, 225_000, 240_000)),
    "imagenet": (800_000, 2e-4, (300_000, 500_000, 650_000, 700_000, 750_000)),
    "finetune": (250_000, 1e-5, (125_000, 200_000, 225_000, 240_000)),
    "real": (1_000_000, 1e-4, ()),
    "real_gan": (400_000, 1e-4, ()),
}

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

#: multiple of which the discriminator takes the sides of images
DISCRIMINATOR_MULTIPLE = 8


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further: folder or Hub id."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": f"Family to train from scratch: {', '.join(MODEL_TYPES)}."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "Published variant of the family, which sets its sizes."}
    )
    config_overrides: list[str] = field(
        default_factory=list, metadata={"help": "Fields of the configuration, such as `embed_dim=48 depths=[2,2]`."}
    )
    scale: int | None = field(
        default=None,
        metadata={
            "help": "Scale. Default: that of the checkpoint or variant, otherwise 2. From a checkpoint of another "
            "scale, all weights with the same shape are used."
        },
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "Initialisation of a model from scratch: `interpolation` of the image, or `random` as in the "
            "papers. Default: interpolation, or random with a recipe."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})


@dataclass
class DataArguments:
    """Arguments of the data; without a folder and a dataset, on photographs of scikit-learn and scikit-image.

    Without validation images the right quarter of each training image is held out.
    """

    train_dir: str | None = field(default=None, metadata={"help": "Folder of images, searched recursively."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of images to evaluate on."})
    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub id of a dataset of images."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Column of the dataset that holds the images."})
    patch_size: int = field(
        default=0, metadata={"help": "Side of low-resolution patches. Default: 64, or 16 without a published size."}
    )
    degradation: str | None = field(
        default=None,
        metadata={
            "help": f"{' or '.join(DEGRADATIONS)}. Default: bicubic, or second_order with the recipes real and "
            "real_gan."
        },
    )
    sharpen_targets: bool | None = field(
        default=None,
        metadata={
            "help": "Unsharp masking of the training targets (not of the discriminator's input). Default: only with "
            "the recipe real. With real_gan it gives the published `sharper` model."
        },
    )
    max_eval_side: int | None = field(
        default=256,
        metadata={"help": "Evaluate on centre crops of this size; 0 for whole images."},
    )


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with the papers' optimizer; trains and evaluates unless --do_train or --do_eval is given."""

    recipe: str | None = field(
        default=None,
        metadata={"help": f"Published recipe: {', '.join(RECIPES)}. Sets steps and learning rate, without warm-up."},
    )
    adversarial: bool | None = field(
        default=None, metadata={"help": "Train against a discriminator. Default: only with the recipe real_gan."}
    )
    perceptual_weights: str | None = field(
        default=None,
        metadata={"help": "File with torchvision's VGG19 weights, for a perceptual loss in adversarial training."},
    )
    discriminator_features: int = field(default=64, metadata={"help": "Width of the discriminator's first level."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: that of the recipe, otherwise 1e-3."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps without a recipe, or their fraction of all steps if below 1."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule without a recipe."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Adam's beta2."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Patches per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Must be 1 if images differ in size."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the exponential moving average of the weights. Default: 0.999, or 0.99 without a recipe."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two log lines."})


def parse_arguments(arguments: list[str] | None) -> tuple[ModelArguments, DataArguments, ScriptTrainingArguments]:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME, (ModelArguments, DataArguments, ScriptTrainingArguments), arguments, __doc__
    )
    if (model_args.model_name_or_path is None) == (model_args.model_type is None):
        raise stop("pass exactly one of --model_name_or_path, --model_type")
    if model_args.model_type not in (None, *MODEL_TYPES):
        raise stop(f"--model_type {model_args.model_type} is not one of {', '.join(MODEL_TYPES)}")
    scratch = (model_args.variant, model_args.config_overrides, model_args.start)
    if model_args.model_name_or_path is not None and any(scratch):
        raise stop("--variant, --config_overrides and --start are for models from scratch (--model_type)")
    if model_args.start not in (None, "interpolation", "random"):
        raise stop(f"--start {model_args.start} is not one of interpolation, random")
    if data_args.dataset_name is not None and data_args.train_dir is not None:
        raise stop("pass either --dataset_name or --train_dir")
    if training_args.recipe not in (None, *RECIPES):
        raise stop(f"--recipe {training_args.recipe} is not one of {', '.join(RECIPES)}")
    small = model_args.model_type is not None and model_args.variant is None
    data_args.patch_size = data_args.patch_size or (16 if small else 64)
    _set_up_real_photographs(data_args, training_args)
    if training_args.recipe is not None:
        steps, learning_rate, _ = RECIPES[training_args.recipe]
        training_args.max_steps = training_args.max_steps if training_args.max_steps > 0 else steps
        training_args.learning_rate = training_args.learning_rate or learning_rate
    elif training_args.learning_rate is None:
        training_args.learning_rate = 1e-3
    if model_args.start is None:
        model_args.start = "interpolation" if training_args.recipe is None else "random"
    if training_args.ema_decay is None:
        training_args.ema_decay = 0.99 if training_args.recipe is None else 0.999
    training_args.remove_unused_columns = False
    command_line.prepare_run(NAME, training_args)
    return model_args, data_args, training_args


def _set_up_real_photographs(data_args: DataArguments, training_args: ScriptTrainingArguments) -> None:
    """Defaults of the recipes for real photographs, and what contradicts them."""
    if data_args.degradation is None:
        data_args.degradation = "second_order" if training_args.recipe in ("real", "real_gan") else "bicubic"
    if data_args.sharpen_targets is None:
        data_args.sharpen_targets = training_args.recipe == "real"
    if training_args.adversarial is None:
        training_args.adversarial = training_args.recipe == "real_gan"
    if data_args.degradation not in DEGRADATIONS:
        raise stop(f"--degradation {data_args.degradation} is not one of {', '.join(DEGRADATIONS)}")
    if training_args.perceptual_weights is not None:
        if not training_args.adversarial:
            raise stop("--perceptual_weights need adversarial training (--adversarial true)")
        if not Path(training_args.perceptual_weights).is_file():
            raise stop(f"--perceptual_weights {training_args.perceptual_weights} is not a file")


# --- data ----------------------------------------------------------------------------------------------------------


class DatasetColumn(Sequence):
    """The images of a Hub dataset."""

    def __init__(self, rows, column: str):
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index][self.column]


def image_files(folder: str) -> list[Path]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise stop(f"there are no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}")
    return files


def load_images(data_args: DataArguments) -> tuple[Images, Images]:
    """Images to train and to evaluate on."""
    validation = None
    if data_args.dataset_name is not None:
        try:
            import datasets
        except ImportError as error:
            raise stop("--dataset_name needs the extra `train`: pip install 'hf_attn[train]'") from error
        raw = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name)
        if "train" not in raw or data_args.image_column not in raw["train"].column_names:
            raise stop(f"{data_args.dataset_name} has no split 'train' with a column {data_args.image_column!r}")
        train = DatasetColumn(raw["train"], data_args.image_column)
        if "validation" in raw:
            validation = DatasetColumn(raw["validation"], data_args.image_column)
    elif data_args.train_dir is not None:
        train = image_files(data_args.train_dir)
    else:
        try:
            train = load_photographs()
        except ImportError as error:
            raise stop(
                f"without --train_dir and --dataset_name, photographs of installed packages are used. {error}"
            ) from error
    if data_args.validation_dir is not None:
        validation = image_files(data_args.validation_dir)
    if validation is None:
        return Images(train, "left"), Images(train, "right")
    return Images(train), Images(validation)


def bicubic_baseline(images: WholeImages, metrics: RestorationMetrics) -> dict[str, float]:
    """The metrics of bicubic enlargement."""
    for pair in images:
        metrics.add(bicubic_resize(pair["pixel_values"], images.scale), pair["labels"])
    return metrics.compute()


# --- model and training --------------------------------------------------------------------------------------------


def make_model(model_args: ModelArguments) -> PreTrainedModel:
    """The model to train."""
    scale = {} if model_args.scale is None else {"upscale": model_args.scale}
    attention = {"attn_implementation": model_args.attn_implementation}
    if model_args.model_name_or_path is not None:
        model, info = AutoModelForImageToImage.from_pretrained(
            model_args.model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=model_args.scale is not None,
            output_loading_info=True,
            **attention,
            **scale,
        )
        # Only the enlarging convolutions depend on the scale.
        unfit = [name for name, *_ in info["mismatched_keys"] if not name.startswith("reconstruction.convolutions.")]
        if unfit:
            raise stop(f"{model_args.model_name_or_path} has weights of other shapes: {', '.join(sorted(unfit))}")
        return model
    config_class = type(AutoConfig.for_model(model_args.model_type))
    overrides = {**scale, **parse_overrides(NAME, model_args.config_overrides, config_class)}
    if model_args.variant is not None:
        if not issubclass(config_class, VariantsMixin):
            raise stop(f"{model_args.model_type} has no published variants; leave --variant out")
        config = config_class.from_variant(model_args.variant, **overrides)
    else:
        known = {config_field.name for config_field in fields(config_class)}
        small = {name: value for name, value in {**SMALL, "upscale": 2}.items() if name in known}
        config = config_class(**{**small, **overrides})
    model = AutoModelForImageToImage.from_config(config, **attention)
    if model_args.start == "interpolation":
        start_as_interpolation(model)
    return model


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights, which the papers evaluate; saved with each checkpoint."""

    file_name = "weight_average.safetensors"

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model, self.decay = model, decay
        self.average = None

    def _start(self) -> None:
        self.average = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def on_train_begin(self, args, state, control, **kwargs):
        self._start()
        if args.resume_from_checkpoint:
            saved = load_file(Path(args.resume_from_checkpoint) / self.file_name)
            for name, weight in self.average.items():
                weight.copy_(saved[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            self.average[name].lerp_(weight, 1 - self.decay)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with written_whole(folder / self.file_name) as part:
                save_file(self.average, part)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average."""
        for name, weight in self.model.named_parameters():
            kept = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(kept)

    @contextmanager
    def in_place(self):
        """The model has the averaged weights inside this context."""
        if self.average is None:
            yield
            return
        self.swap()
        try:
            yield
        finally:
            self.swap()


class Trainer(ExactEvaluationMixin, HubTrainerMixin, transformers.Trainer):
    """Evaluates averaged weights, halves the learning rate by a recipe, and writes the model card of the family."""

    def __init__(self, *args, weight_average: WeightAverage, metrics: RestorationMetrics | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_average, self.metrics = weight_average, metrics
        self.add_callback(weight_average)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The recipe's schedule, with its milestones moved if the training is of another length."""
        if self.args.recipe is None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps, _, milestones = RECIPES[self.args.recipe]
        milestones = [round(milestone * num_training_steps / steps) for milestone in milestones]
        self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer or self.optimizer, milestones=milestones, gamma=0.5
        )
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        with self.weight_average.in_place():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the scores of the images in the place of the images, which differ in size from process to process."""
        loss, outputs, labels = super().prediction_step(model, inputs, False, ignore_keys)
        reconstruction = outputs[0] if isinstance(outputs, tuple) else outputs
        scores = [self.metrics.scores(*pair) for pair in zip(reconstruction, labels, strict=True)]
        scores = torch.tensor(scores, device=labels.device)
        return loss, scores, scores


def mean_scores(evaluation: transformers.EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the scores `(images, 2)` of all processes."""
    return dict(zip(RestorationMetrics.score_names, evaluation.predictions.mean(axis=0).tolist(), strict=True))


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    """Trains against a discriminator."""


def make_adversary(training_args: ScriptTrainingArguments, output_side: int) -> dict[str, torch.nn.Module]:
    """Additional arguments of `AdversarialTrainer`."""
    if output_side % DISCRIMINATOR_MULTIPLE:
        raise stop(
            f"the discriminator needs output patches whose side ({output_side}) is a multiple of "
            f"{DISCRIMINATOR_MULTIPLE}; change --patch_size"
        )
    adversary = {"discriminator": UNetDiscriminator(num_features=training_args.discriminator_features)}
    if training_args.perceptual_weights is None:
        logger.warning("No --perceptual_weights: adversarial training runs without the perceptual loss.")
    else:
        adversary["perceptual_loss"] = PerceptualLoss(training_args.perceptual_weights)
    return adversary


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
    model = make_model(model_args)
    scale = model.config.upscale
    train_images, eval_images = load_images(data_args)
    eval_pairs = WholeImages(eval_images, scale, data_args.max_eval_side, data_args.degradation)
    patches = Patches(
        train_images,
        scale,
        data_args.patch_size,
        data_args.degradation,
        data_args.sharpen_targets,
        keep_originals=training_args.adversarial,
    )
    # An epoch has many patches of each image.
    patches = torch.utils.data.ConcatDataset([patches] * 100)
    if training_args.should_log:
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, scale {scale}")
        print(f"{len(train_images)} images to train on, {len(eval_images)} to evaluate on")

    metrics = RestorationMetrics(crop_border=scale)
    weight_average = WeightAverage(model, training_args.ema_decay)
    trainer_class, adversary = Trainer, {}
    if training_args.adversarial and training_args.do_train:
        trainer_class, adversary = AdversarialTrainer, make_adversary(training_args, scale * data_args.patch_size)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=patches if training_args.do_train else None,
        eval_dataset=eval_pairs,
        data_collator=default_data_collator,
        compute_metrics=mean_scores,
        metrics=metrics,
        weight_average=weight_average,
        **adversary,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        with weight_average.in_place():
            trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)

    evaluation = {}
    if training_args.do_eval:
        evaluation = trainer.evaluate()
        baseline = bicubic_baseline(eval_pairs, metrics)
        evaluation |= {f"eval_bicubic_{name}": value for name, value in baseline.items()}
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)

    card = {"dataset_tags": data_args.dataset_name, "finetuned_from": model_args.model_name_or_path}
    if training_args.push_to_hub:
        with weight_average.in_place():
            trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return evaluation


if __name__ == "__main__":
    run_script(NAME, main)
