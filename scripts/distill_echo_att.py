# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Make an EchoAtt student of a Llama-like model and distil it in the two stages of the paper (arXiv 2409.14595).

    python scripts/distill_echo_att.py --output_dir outputs/student --num_shared 7 --max_steps 100 --block_size 128

takes SmolLM2-135M-Instruct and the topics of Python's documentation; `--model_name_or_path` and `--dataset_name` take
anything else. The
layers that share an attention map are the ones whose maps resemble the others' most, or those of `--shared_layers`.
Started again with the same arguments it continues where it was, and ends with the same weights.

Several processes on one machine without GPUs:

    torchrun --nproc_per_node 2 scripts/distill_echo_att.py --use_cpu true --ddp_backend gloo --output_dir ...

Several GPUs, the student sharded by FSDP, with a whole frozen teacher in each process:

    accelerate launch --config_file scripts/configs/echo_att_fsdp.yaml scripts/distill_echo_att.py --bf16 true \
        --model_name_or_path TinyLlama/TinyLlama_v1.1 --dataset_name cerebras/SlimPajama-627B --output_dir ...
"""

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_attn.analysis import attention_similarity
from hf_attn.examples.assets import read_texts, smollm2_folder, token_blocks
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.echo_att.distillation import EchoAttDistillationTrainer, check_teacher
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import MachineArguments, run_script, training_folder
from hf_attn.training.stages import train_stage


NAME = "distill_echo_att.py"
stop = partial(command_line.stop, NAME)


@dataclass
class ModelArguments:
    """The teacher, and which of its layers share."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Base model and teacher: folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 model. "
            "Default: SmolLM2-135M-Instruct."
        },
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an EchoAtt model to distil further, instead of a new one."},
    )
    shared_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers, counted from 0, that use the attention map of an earlier layer."}
    )
    num_shared: int | None = field(
        default=None,
        metadata={
            "help": "Number of shared layers, chosen by measured similarity; an alternative to --shared_layers."
        },
    )
    similarity_samples: int = field(
        default=16,
        metadata={"help": "Number of training sequences on which the similarity of attention maps is measured."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})


@dataclass
class DataArguments:
    """Arguments of the data; without a dataset and a file, on the topics of Python's own documentation."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub id of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on."})
    block_size: int = field(default=512, metadata={"help": "Tokens per sequence (paper: 2048)."})


@dataclass
class DistillationArguments(MachineArguments):
    """transformers' arguments for stage 1 with the paper's defaults, and the paper's own."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of stage 1."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of both stages."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Of both stages."})
    warmup_steps: float = field(
        default=0.005, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    save_steps: float = field(default=50, metadata={"help": "Steps between two checkpoints to continue from."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    refinement_ratio: float = field(
        default=0.25,
        metadata={"help": "Length of stage 2 (next-token training) as a fraction of stage 1; 0 for no stage 2."},
    )
    loss_weights: list[float] = field(
        default_factory=lambda: [0.25, 0.25, 0.5],
        metadata={"help": "Weights of the hidden-state, soft-label and hard-label losses."},
    )
    kl_direction: str = field(
        default="student_teacher",
        metadata={"help": "Direction of the divergence: student_teacher (as in the paper) or teacher_student."},
    )
    intermediate_reduction: str = field(default="mean", metadata={"help": "Mean or sum of squared differences."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


class RefinementTrainer(HubTrainerMixin, transformers.Trainer):
    """Stage 2; writes the model card of the family."""


def parse_arguments(arguments: list[str] | None) -> tuple[ModelArguments, DataArguments, DistillationArguments]:
    """Parse command line arguments, or the JSON file that is the only one of them."""
    model_args, data_args, training_args = command_line.parse_arguments(
        NAME, (ModelArguments, DataArguments, DistillationArguments), arguments, __doc__
    )
    choices = (model_args.student, model_args.shared_layers, model_args.num_shared)
    if sum(choice is not None for choice in choices) != 1:
        raise stop("pass exactly one of --num_shared, --shared_layers and --student")
    if data_args.dataset_name is not None and data_args.train_file is not None:
        raise stop("pass either --dataset_name or --train_file")
    if len(training_args.loss_weights) != 3:
        raise stop(f"--loss_weights needs three numbers, got {training_args.loss_weights}")
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    return model_args, data_args, training_args


def settings_of(model_args: ModelArguments, data_args: DataArguments, training_args: DistillationArguments) -> dict:
    """Settings that the resulting weights depend on."""
    training = command_line.training_settings_of(
        training_args, "refinement_ratio", "loss_weights", "kl_direction", "intermediate_reduction"
    )
    return {**command_line.settings_of(model_args, data_args), **training}


def make_student(model_args: ModelArguments, teacher: PreTrainedModel, blocks: torch.Tensor) -> EchoAttForCausalLM:
    """The student before its distillation."""
    if model_args.student is not None:
        student = EchoAttForCausalLM.from_pretrained(
            model_args.student, attn_implementation=model_args.attn_implementation
        )
        check_teacher(student.config, teacher.config)
        return student
    if model_args.shared_layers is not None:
        return EchoAttForCausalLM.from_base(teacher, shared_layers=model_args.shared_layers)
    is_main = PartialState().is_main_process
    similarity = attention_similarity(teacher, blocks[: model_args.similarity_samples], progress=is_main)
    PartialState().print(similarity)
    # All processes have to build the same model, even if rounding breaks a tie differently.
    (shared_layers,) = broadcast_object_list([similarity.shared_layers(num_shared=model_args.num_shared)])
    return EchoAttForCausalLM.from_base(teacher, shared_layers=shared_layers)


def stage_arguments(training_args: DistillationArguments, folder: Path, ratio: float) -> DistillationArguments:
    """Arguments of a stage that is `ratio` times as long as stage 1."""
    arguments = copy.copy(training_args)
    arguments.output_dir = str(folder)
    arguments.num_train_epochs = training_args.num_train_epochs * ratio
    if training_args.max_steps > 0:
        arguments.max_steps = math.ceil(training_args.max_steps * ratio)
    arguments.push_to_hub = False
    return arguments


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(arguments)
    settings = settings_of(model_args, data_args, training_args)
    with training_folder(NAME, training_args, settings, continues=True):
        distil(model_args, data_args, training_args)


def distil(model_args: ModelArguments, data_args: DataArguments, training_args: DistillationArguments) -> None:
    """Both stages, as far as they are not done yet."""
    output = Path(training_args.output_dir)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="fetching the teacher"):
        teacher_name = model_args.model_name_or_path or smollm2_folder()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(teacher_name)
    # The student is made of these weights and trained in full precision.
    teacher = AutoModelForCausalLM.from_pretrained(
        teacher_name, dtype=torch.float32, attn_implementation=model_args.attn_implementation
    )
    texts = read_texts(
        "train", data_args.dataset_name, data_args.dataset_config_name, data_args.text_column, data_args.train_file
    )
    blocks = token_blocks(texts, tokenizer, data_args.block_size)
    dataset = [{"input_ids": block, "labels": block} for block in blocks]

    model_folder = output / "distilled"
    if not model_folder.is_dir():
        student = make_student(model_args, teacher, blocks)
        PartialState().print(f"Shared layers: {student.config.shared_layers}\n{student.base_report or ''}")
        if training_args.bf16:
            teacher.to(torch.bfloat16)
        trainer = EchoAttDistillationTrainer(
            model=student,
            args=stage_arguments(training_args, output / "stage1", 1.0),
            train_dataset=dataset,
            data_collator=default_data_collator,
            teacher=teacher,
            loss_weights=tuple(training_args.loss_weights),
            kl_direction=training_args.kl_direction,
            intermediate_reduction=training_args.intermediate_reduction,
            processing_class=tokenizer,
        )
        train_stage(trainer, model_folder)
        del student, trainer
    del teacher

    if training_args.refinement_ratio > 0:
        student = EchoAttForCausalLM.from_pretrained(model_folder, attn_implementation=model_args.attn_implementation)
        stage2 = stage_arguments(training_args, output / "stage2", training_args.refinement_ratio)
        trainer = RefinementTrainer(
            model=student,
            args=stage2,
            train_dataset=dataset,
            data_collator=default_data_collator,
            processing_class=tokenizer,
        )
        model_folder = train_stage(trainer, output / "refined")
    if training_args.process_index == 0:
        print(f"The student was saved to {model_folder}.")
        if training_args.push_to_hub:
            name = training_args.hub_model_id or output.name
            student = EchoAttForCausalLM.from_pretrained(model_folder)
            student.push_to_hub(name, token=training_args.hub_token, private=training_args.hub_private_repo)
            tokenizer.push_to_hub(name, token=training_args.hub_token)


if __name__ == "__main__":
    run_script(NAME, main)
