# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Distillation of EchoAtt students (arXiv 2409.14595, section 3.3).

Stage 1 trains on pseudo-labels of the frozen original model:

    L_I = mean over blocks of || S_i(x) - T_i(x) ||^2     hidden states after the last layer of each block
    L_S = KL(softmax(S) || softmax(T))                    as printed: the student first, no temperature
    L_H = CE(softmax(S), argmax(T))                       the teacher's most likely token as label
    L   = alpha L_I + beta L_S + gamma L_H                (alpha, beta, gamma) = (0.25, 0.25, 0.5)

Stage 2 is ordinary next-token training. The losses of tokens are means over all tokens of a batch, wherever its parts are
computed: over accumulation steps and processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from .configuration_echo_att import EchoAttConfig


def block_ends(config: EchoAttConfig) -> list[int]:
    """Layers, counted from 0, after which student and teacher are compared: the last of each run of shared layers."""
    shared = set(config.shared_layers)
    return sorted(layer for layer in shared if layer + 1 not in shared)


def intermediate_loss(
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    mask: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`L_I`: squared distance of hidden states, averaged over the compared layers.

    Args:
        student_states, teacher_states: a tensor `(batch, sequence, hidden_size)` for each compared layer.
        mask: `(batch, sequence)`, nonzero for the tokens to include; all of them if not given.
        num_items: divisor to use instead of this batch's number of tokens (`"mean"`) or sequences (`"sum"`).
        reduction: `"mean"` is the mean over tokens and dimensions, `"sum"` the squared norm of a sequence.

    Raises:
        ValueError: for another `reduction`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    squares = [
        (student.float() - teacher.float()).pow(2).sum(dim=-1)
        for student, teacher in zip(student_states, teacher_states, strict=True)
    ]
    distance = torch.stack(squares).mean(dim=0)
    if reduction == "mean":
        return _token_mean(distance / student_states[0].shape[-1], mask, num_items)
    return _token_mean(distance, mask, distance.shape[0] if num_items is None else num_items)


def soft_label_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    direction: str = "student_teacher",
) -> torch.Tensor:
    """`L_S`: Kullback-Leibler divergence between the distributions over the next token, mean over tokens.

    Args:
        student_logits, teacher_logits: `(batch, sequence, vocab_size)`.
        mask, num_items: as in [`intermediate_loss`].
        direction: `"student_teacher"` for KL(student || teacher), as the paper prints it, or `"teacher_student"`.

    Raises:
        ValueError: for another `direction`.
    """
    student = nn.functional.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    teacher = nn.functional.log_softmax(teacher_logits, dim=-1, dtype=torch.float32)
    if direction == "student_teacher":
        divergence = nn.functional.kl_div(teacher, student, reduction="none", log_target=True)
    elif direction == "teacher_student":
        divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
    else:
        raise ValueError(f"direction must be 'student_teacher' or 'teacher_student', got {direction!r}.")
    return _token_mean(divergence.sum(dim=-1), mask, num_items)


def hard_label_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`L_H`: cross entropy with the teacher's most likely token, mean over tokens; arguments as in
    [`soft_label_loss`]."""
    entropy = nn.functional.cross_entropy(
        student_logits.float().transpose(1, 2), teacher_logits.argmax(dim=-1), reduction="none"
    )
    return _token_mean(entropy, mask, num_items)


def _token_mean(values: torch.Tensor, mask: torch.Tensor | None, num_items: int | torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.sum() / (values.numel() if num_items is None else num_items)
    mask = mask.to(values.dtype)
    return (values * mask).sum() / (mask.sum() if num_items is None else num_items)


class EchoAttDistillationTrainer(Trainer):
    """Trainer of stage 1. Batches need `input_ids` and, if they are padded, `attention_mask`; labels are not used.

    Under `accelerate` the student is wrapped as usual (DDP, FSDP), while every process holds a whole frozen teacher.

    Args:
        teacher: the original model.
        loss_weights: alpha, beta and gamma.
        kl_direction: see [`soft_label_loss`].
        intermediate_reduction: see [`intermediate_loss`].
        kwargs: arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: if the teacher's vocabulary, layers or width are not the student's, or an option is unknown.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        loss_weights: tuple[float, float, float] = (0.25, 0.25, 0.5),
        kl_direction: str = "student_teacher",
        intermediate_reduction: str = "mean",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        check_teacher(student.config, teacher.config)
        self.block_ends = block_ends(student.config)
        if not self.block_ends:
            raise ValueError("The student shares no layers, so it equals the teacher and there is nothing to distil.")
        self.loss_weights = loss_weights
        self.kl_direction = kl_direction
        self.intermediate_reduction = intermediate_reduction
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the three losses; see [`~transformers.Trainer.compute_loss`]."""
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        mask = inputs.get("attention_mask")
        num_tokens, num_sequences = (None, None) if num_items_in_batch is None else num_items_in_batch

        with torch.no_grad(), recorded_layers(self.teacher, self.block_ends) as teacher_states:
            teacher_logits = self.teacher(**inputs, use_cache=False).logits
        with recorded_layers(self.accelerator.unwrap_model(model), self.block_ends) as student_states:
            outputs = model(**inputs, use_cache=False)

        alpha, beta, gamma = self.loss_weights
        num_items = num_tokens if self.intermediate_reduction == "mean" else num_sequences
        loss = (
            alpha * intermediate_loss(student_states, teacher_states, mask, num_items, self.intermediate_reduction)
            + beta * soft_label_loss(outputs.logits, teacher_logits, mask, num_tokens, self.kl_direction)
            + gamma * hard_label_loss(outputs.logits, teacher_logits, mask, num_tokens)
        )
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, and these losses are parts of a global mean already.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Numbers of tokens and of sequences in all batches of an optimisation step, on all processes."""
        if not batch_samples:
            return None
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            mask = batch.get("attention_mask")
            counts[0] += batch["input_ids"].numel() if mask is None else mask.sum().to(device)
            counts[1] += batch["input_ids"].shape[0]
        return self.accelerator.reduce(counts, reduction="sum")


def check_teacher(student: EchoAttConfig, teacher: PreTrainedConfig) -> None:
    """Check that hidden states and logits of two models can be compared.

    Args:
        student, teacher: their configurations.

    Raises:
        ValueError: naming the first of vocabulary, number of layers and width that differs.
    """
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(
                f"The teacher does not match the student: {name} is {theirs} in the teacher and {ours} in the "
                "student. The teacher must be the model from which EchoAttForCausalLM.from_base made the student."
            )


@contextmanager
def recorded_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states after some decoder layers during the forward passes in its context.

    Unlike `output_hidden_states` these are before the final norm for the last layer too, as the loss needs them.
    """
    states: list[torch.Tensor] = []

    def record(module, arguments, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    decoder_layers = model.get_decoder().layers
    handles = [decoder_layers[layer].register_forward_hook(record) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "EchoAttDistillationTrainer",
    "block_ends",
    "check_teacher",
    "hard_label_loss",
    "intermediate_loss",
    "recorded_layers",
    "soft_label_loss",
]
