#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Distil a FLUX transformer into one with CLEAR's local attention (arXiv 2412.16112), on images that it generates itself.

    python scripts/distill_clear.py --output_dir outputs/clear

makes a tiny FLUX pipeline, trains it, generates images with it and distils it, all on a CPU in some minutes. It prints the
student-teacher error on held-out images, noise and noise levels, and saves the curve (`curve.json`, `curve.png`) and the
weights (`clear.safetensors`, for `load_clear_weights`). The teacher is trained first because with random weights local
attention hardly changes what it computes; then the error starts at 28% of the mean square of what the teacher predicts, and
ends 8.5 times lower, after 2 minutes on one core. Started again with the same arguments it continues where it was,
and ends with the same weights. In two processes: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 scripts/...`.

FLUX.1-dev as in the paper, on 4 GPUs, whose memory holds a shard of the student and a whole teacher each:

    accelerate launch --config_file scripts/configs/clear_fsdp.yaml scripts/distill_clear.py --output_dir outputs/clear_16 \\
        --model_name_or_path black-forest-labs/FLUX.1-dev --prompts prompts.txt --num_samples 10000 --resolution 1024 --radius 16 \\
        --max_sequence_length 512 --optimizer prodigy --learning_rate 1 --batch_size 2 --gradient_accumulation_steps 4 \\
        --max_steps 10000 --gradient_checkpointing --eval_steps 250 --checkpoint_steps 500

Losses, trained parameters and noise levels are those of the official code; there is no moving average of weights.
"""

import copy
import hashlib
import json
import math
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import run_script, settings_of
from hf_attn.training.output_folder import OutputFolderError, claim_output_folder, output_folder
from hf_attn.training.writing import part_of, written_whole


try:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from hf_attn.patching.clear import apply_clear
    from hf_attn.patching.clear.distillation import (
        ClearDistillation,
        ClearDistillationOutput,
        compared_attention,
        freeze_for_distillation,
    )
    from hf_attn.patching.clear.distillation_data import SampleFolder, generate_samples
    from hf_attn.patching.clear.example import DIRECTIONS, PIXELS_OF_A_TOKEN, tiny_flux_pipeline, train_tiny_flux
    from hf_attn.patching.clear.weights import save_clear_weights
except ImportError as error:
    raise SystemExit("This script needs the extra `diffusers`: pip install 'hf_attn[diffusers]'") from error

NAME = "distill_clear.py"
stop = partial(command_line.stop, NAME)


@dataclass
class DataArguments:
    """The teacher, and the images that it generates for training; the defaults are those of the tiny example."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Base model and teacher: folder or Hub id of a FLUX pipeline. Default: a tiny one, which is "
            "trained first."
        },
    )
    prompts: Path | None = field(
        default=None, metadata={"help": "Text file with one prompt per line; required with --model_name_or_path."}
    )
    num_samples: int = field(
        default=288, metadata={"help": "Number of images to generate; prompts are repeated as needed."}
    )
    num_held_out: int = field(
        default=32, metadata={"help": "Number of these images that are held out to measure the error."}
    )
    resolution: int = field(default=24, metadata={"help": "Side of the images in pixels (paper: 1024)."})
    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps per image."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Guidance scale of image generation and training."})
    max_sequence_length: int = field(default=4, metadata={"help": "Number of text tokens, with padding (paper: 512)."})
    generation_batch_size: int = field(default=32, metadata={"help": "Images generated together."})
    data_dir: Path | None = field(
        default=None,
        metadata={
            "help": "Folder for the generated images, which several runs can share. Default: a folder in output_dir."
        },
    )
    teacher_steps: int = field(default=300, metadata={"help": "Training steps of the tiny teacher."})


@dataclass
class DistillationArguments:
    """The student and its training; unless noted otherwise the defaults are those of the official code."""

    output_dir: Path = field(metadata={"help": "Output folder. A run with the same settings is continued."})
    radius: int = field(default=2, metadata={"help": "Radius of the local window, in tokens (paper: 8, 16, 32)."})
    down_factor: int = field(default=1, metadata={"help": "Side of the pooled cells; 1 for no pooling (paper: 1, 4)."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps (paper: 10000)."})
    batch_size: int = field(default=16, metadata={"help": "Images per process and batch (official: 2 on 4 GPUs)."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step (official: 4)."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or prodigy as in the official code."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Constant learning rate (official: 1, with Prodigy)."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Decoupled."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm for clipping."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute blocks in the backward pass."})
    eval_steps: int = field(default=25, metadata={"help": "Steps between two measurements of the error."})
    checkpoint_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints to continue from."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


class Curve:
    """The measurements so far; part of a checkpoint."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"]

    def save(self, folder: Path) -> None:
        with written_whole(folder / "curve.json") as part:
            part.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> tuple[DataArguments, DistillationArguments]:
    data, options = command_line.parse_arguments(NAME, (DataArguments, DistillationArguments), arguments, __doc__)
    if (data.model_name_or_path is None) != (data.prompts is None):
        raise stop("--model_name_or_path and --prompts must be used together: the example has its own")
    if data.prompts is not None and not data.prompts.is_file():
        raise stop(f"--prompts: there is no file {data.prompts}")
    if not 0 < data.num_held_out < data.num_samples:
        raise stop("--num_held_out must be at least 1 and less than --num_samples")
    if options.optimizer not in ("adamw", "prodigy"):
        raise stop(f"--optimizer must be adamw or prodigy, got {options.optimizer}")
    side = (PIXELS_OF_A_TOKEN if data.model_name_or_path is None else 16) * options.down_factor
    if data.resolution % side:
        raise stop(f"--resolution must be a multiple of {side} pixels, got {data.resolution}")
    return data, options


def load_pipeline(data: DataArguments, output: Path, accelerator: Accelerator, seed: int) -> tuple[FluxPipeline, Path]:
    """The teacher's pipeline and where it is; the tiny one is trained once and kept in the output folder."""
    if data.model_name_or_path is not None:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        return FluxPipeline.from_pretrained(data.model_name_or_path, torch_dtype=dtype), data.model_name_or_path
    folder = output / "teacher"
    if accelerator.is_main_process and not folder.exists():
        pipe = tiny_flux_pipeline(seed)
        side = data.resolution // PIXELS_OF_A_TOKEN
        train_tiny_flux(pipe, (side, side), data.teacher_steps, seed=seed)
        with written_whole(folder) as part:
            pipe.save_pretrained(part)
    accelerator.wait_for_everyone()
    return FluxPipeline.from_pretrained(folder), folder


def prepare_samples(data: DataArguments, options: DistillationArguments, accelerator: Accelerator):
    """Generate missing samples; returns the samples, the noise levels to train on and the path of the teacher."""
    pipe, teacher = load_pipeline(data, options.output_dir, accelerator, options.seed)
    prompts = DIRECTIONS if data.prompts is None else data.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [prompt for prompt in prompts if prompt.strip()]
    prompts = [prompts[i % len(prompts)] for i in range(data.num_samples)]
    folder = data.data_dir or options.output_dir / "data"
    # Text encoders and VAE are needed only here; the training loads only the transformer.
    pipe.to(accelerator.device)
    generate_samples(
        pipe,
        prompts,
        folder / "samples",
        height=data.resolution,
        width=data.resolution,
        num_inference_steps=data.num_inference_steps,
        guidance_scale=data.guidance_scale,
        max_sequence_length=data.max_sequence_length,
        batch_size=data.generation_batch_size,
        seed=options.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    # Sampling leaves its own few noise levels in the scheduler.
    sigmas = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config).sigmas[:1000].clone()
    return SampleFolder(folder / "samples", data.num_samples), sigmas, teacher


def claim_folders(
    data: DataArguments, options: DistillationArguments, accelerator: Accelerator, stack: ExitStack
) -> None:
    """Make sure that output and data folder belong to this run, or are new, and hold the output folder."""
    ignored = ("output_dir", "data_dir", "overwrite_output_dir", "generation_batch_size")
    settings = settings_of(data, options, without=ignored)
    settings |= {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    if data.prompts is not None:
        settings["prompts"] = hashlib.sha256(data.prompts.read_bytes()).hexdigest()
    stack.enter_context(output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME))
    if data.data_dir is not None:
        if data.model_name_or_path is None:
            raise OutputFolderError("--data_dir needs --model_name_or_path: the tiny teacher belongs to its run.")
        names = [name for name in asdict(data) if name not in (*ignored, "num_held_out", "teacher_steps")]
        samples = {name: settings[name] for name in (*names, "seed")}
        claim_output_folder(data.data_dir, samples, command=f"{NAME} (samples)")


def make_optimizer(parameters: list[nn.Parameter], options: DistillationArguments) -> torch.optim.Optimizer:
    arguments = {"lr": options.learning_rate, "betas": (0.9, 0.999), "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise stop("--optimizer prodigy needs the package prodigyopt: pip install prodigyopt") from error
    return Prodigy(parameters, **arguments, decouple=True, use_bias_correction=True, safeguard_warmup=True)


class Batches:
    """Training batches that depend only on the step, so that a resumed run uses the same batches.

    Noise belongs to the place of an image in the whole training: more processes or accumulated batches of fewer images
    each see the same.
    """

    def __init__(self, samples: SampleFolder, count: int, sigmas: torch.Tensor, options, accelerator: Accelerator):
        self.samples, self.count, self.sigmas, self.options = samples, count, sigmas, options
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes

    def get(self, step: int, accumulated: int) -> dict[str, torch.Tensor]:
        batch_size = self.options.batch_size
        batch = (step * self.options.gradient_accumulation_steps + accumulated) * self.world + self.rank
        positions = range(batch * batch_size, (batch + 1) * batch_size)
        indices = [self._index(position) for position in positions]
        seeds = [(2 * self.options.seed << 32) + position for position in positions]
        return noisy_batch(self.samples, indices, self.sigmas, seeds, self.device)

    def held_out(self) -> list[dict[str, torch.Tensor]]:
        indices = torch.arange(self.count, len(self.samples)).split(self.options.batch_size)
        first = (2 * self.options.seed + 1) << 32
        return [
            noisy_batch(self.samples, chosen, self.sigmas, [first + i for i in chosen], self.device)
            for chosen in (chosen.tolist() for chosen in indices)
        ]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.options.seed + epoch))
        return int(order[place])


def noisy_batch(
    samples: SampleFolder, indices: list[int], sigmas: torch.Tensor, seeds: list[int], device
) -> dict[str, torch.Tensor]:
    """Samples with noise and noise levels, the latter uniform over those of the scheduler."""
    batch = samples.batch(indices)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape, dtype = batch["latents"].shape[1:], batch["latents"].dtype
    batch["noise"] = torch.stack([torch.randn(shape, generator=generator).to(dtype) for generator in generators])
    batch["sigmas"] = torch.stack(
        [sigmas[int(torch.randint(len(sigmas), (), generator=generator))] for generator in generators]
    )
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict], guidance: float) -> dict[str, float]:
    """Mean losses on the held-out batches, and the mean square of the teacher's predictions.

    Every process measures all of them: shards of a model are computed with by all processes at once.
    """
    totals: dict[str, float] = {}
    count = sum(len(batch["sigmas"]) for batch in batches)
    for batch in batches:
        output: ClearDistillationOutput = model(**batch, guidance=guidance)
        row = {
            "error": output.prediction_loss,
            "flow_matching_loss": output.flow_matching_loss,
            "attention_loss": output.attention_loss,
            "teacher_power": output.teacher_prediction.float().square().mean(),
        }
        for name, value in row.items():
            totals[name] = totals.get(name, 0.0) + value.item() * len(batch["sigmas"]) / count
    return totals


def last_checkpoint(folder: Path) -> Path | None:
    steps = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save all that the rest of the run depends on, and drop the checkpoint before."""
    before, checkpoint = last_checkpoint(folder), folder / f"step_{step}"
    # All processes save together; the first one makes the place before, and the checkpoint after.
    with written_whole(checkpoint) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part_of(checkpoint)))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process and before is not None:
        shutil.rmtree(before)
    accelerator.wait_for_everyone()


def distil(
    data: DataArguments,
    options: DistillationArguments,
    samples: SampleFolder,
    sigmas: torch.Tensor,
    teacher_folder: str | Path,
    accelerator: Accelerator,
) -> Curve:
    """Train the student, from the last checkpoint if there is one, and save its weights."""
    teacher = FluxTransformer2DModel.from_pretrained(teacher_folder, subfolder="transformer").requires_grad_(False)
    student = copy.deepcopy(teacher).train()
    teacher.to(accelerator.device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else None).eval()
    apply_clear(student, options.radius, options.down_factor)
    trainable = freeze_for_distillation(student)
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    accelerator.print(
        f"{sum(p.numel() for p in trainable.values()):,} of {sum(p.numel() for p in student.parameters()):,} parameters "
        f"are trained; attention is compared in {', '.join(compared_attention(student)) or 'no layer'}."
    )
    if accelerator.distributed_type == "DEEPSPEED":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size
    model, optimizer = accelerator.prepare(
        ClearDistillation(student, teacher), make_optimizer(list(trainable.values()), options)
    )
    curve = Curve()
    accelerator.register_for_checkpointing(curve)
    checkpoints, step = options.output_dir / "checkpoints", 0
    if (found := last_checkpoint(checkpoints)) is not None:
        accelerator.load_state(str(found))
        step = int(found.name.removeprefix("step_"))

    count = data.num_samples - data.num_held_out
    batches = Batches(samples, count, sigmas, options, accelerator)
    held_out = batches.held_out()
    progress = tqdm(total=options.max_steps, initial=step, desc="distilling", disable=not accelerator.is_main_process)
    if not curve.rows:
        curve.rows.append({"step": 0, **measure(model, held_out, data.guidance_scale)})
        report(curve, progress, accelerator)
    while step < options.max_steps:
        for accumulated in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                output = model(**batches.get(step, accumulated), guidance=data.guidance_scale)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        progress.update()
        if step % options.eval_steps == 0 or step == options.max_steps:
            curve.rows.append({"step": step, **measure(model, held_out, data.guidance_scale)})
            report(curve, progress, accelerator)
        if step % options.checkpoint_steps == 0 or step == options.max_steps:
            save_checkpoint(accelerator, checkpoints, step)
    progress.close()

    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model).student
        gathered = {name.removeprefix("student."): tensor for name, tensor in state_dict.items()}
        save_clear_weights(unwrapped, options.output_dir, gathered)
        curve.save(options.output_dir)
    return curve


def report(curve: Curve, progress: tqdm, accelerator: Accelerator) -> None:
    """One line of the curve."""
    row, first = curve.rows[-1], curve.rows[0]
    if not math.isfinite(row["error"]):
        raise SystemExit(f"The error is {row['error']} after {row['step']} steps: choose a lower --learning_rate.")
    if accelerator.is_main_process:
        progress.write(
            f"step {row['step']:>6}  student-teacher error {row['error']:.5f} ({row['error'] / row['teacher_power']:.1%} of "
            f"the teacher's power)  {first['error'] / row['error']:.2f} times lower than at first  "
            f"attention {row['attention_loss']:.5f}  flow matching {row['flow_matching_loss']:.4f}"
        )


def plot(curve: Curve, path: Path) -> None:
    """Plot the error against the steps, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not plotted: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in curve.rows]
    axes.plot(steps, [row["error"] for row in curve.rows], marker=".", label="student - teacher")
    axes.plot(steps, [row["attention_loss"] for row in curve.rows], marker=".", label="attention outputs")
    axes.axhline(curve.rows[0]["error"] / 5, color="grey", linestyle=":", label="a fifth of the first error")
    axes.set(yscale="log", xlabel="step", ylabel="mean squared difference", title="Distillation, on held-out images")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Generate, distil and save; returns the curve."""
    data, options = parse_arguments(arguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps, cpu=not torch.accelerator.is_available()
    )
    with ExitStack() as stack:
        try:
            with accelerator.main_process_first():
                if accelerator.is_main_process:
                    claim_folders(data, options, accelerator, stack)
        except OutputFolderError as error:
            raise stop(error) from error
        samples, sigmas, teacher_folder = prepare_samples(data, options, accelerator)
        curve = distil(data, options, samples, sigmas, teacher_folder, accelerator)
        if accelerator.is_main_process:
            plot(curve, options.output_dir / "curve.png")
            print(f"The weights were saved to {options.output_dir / 'clear.safetensors'}.")
        # A process that exits with its group open can abort; ending the training also releases the prepared objects.
        accelerator.end_training()
    return curve.rows


if __name__ == "__main__":
    run_script(NAME, main)
