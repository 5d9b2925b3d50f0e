"""The distillation of CLEAR: a FLUX transformer with local attention is trained to reproduce its outputs with full attention.

    L = mean (v - (noise - x_0))^2 + 0.5 mean (v - v_T)^2 + 0.5 mean over layers of mean (a - a_T)^2

v is the velocity that the student predicts at x_t = (1 - sigma) x_0 + sigma noise, v_T what the teacher predicts, a the
output of an attention layer, of text and image tokens. The attention layers compared are the single-stream ones whose
place in the list of all is divisible by four.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


#: parts of the names of the parameters that are trained; text projections and norms are not
TRAINABLE = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.", "spatial_weight")
PREDICTION_WEIGHT = 0.5
ATTENTION_WEIGHT = 0.5


@dataclass(frozen=True)
class ClearDistillationOutput:
    """Losses, scalars, and predictions `(batch, channels, height, width)`.

    Attributes:
        loss: the weighted sum.
        flow_matching_loss: against the velocity of the data.
        prediction_loss: against the teacher's prediction.
        attention_loss: against the teacher's attention layers.
        student_prediction: velocity that the student predicts.
        teacher_prediction: velocity that the teacher predicts.
    """

    loss: torch.Tensor
    flow_matching_loss: torch.Tensor
    prediction_loss: torch.Tensor
    attention_loss: torch.Tensor
    student_prediction: torch.Tensor
    teacher_prediction: torch.Tensor


def freeze_for_distillation(student: nn.Module) -> dict[str, nn.Parameter]:
    """Require gradients only for the parameters that the paper trains.

    Returns:
        The trainable parameters by name.
    """
    trainable = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINABLE))
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def compared_attention(transformer: nn.Module) -> list[str]:
    """Names of the attention layers that the attention loss compares."""
    names = [name.removesuffix(".processor") for name in transformer.attn_processors]
    return [name for i, name in enumerate(names) if i % 4 == 0 and name.startswith("single_transformer_blocks.")]


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(batch, channels, 2 * height, 2 * width)` as tokens `(batch, height * width, 4 * channels)`."""
    blocks = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of [`pack_latents`]; height and width in tokens."""
    blocks = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """FLUX's position ids of image tokens, `(height * width, 3)`."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def distillation_losses(
    student: nn.Module,
    teacher: nn.Module,
    *,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    guidance: float = 3.5,
) -> ClearDistillationOutput:
    """Losses of one batch.

    Args:
        student: FLUX transformer with CLEAR attention.
        teacher: the same with full attention; it gets no gradients.
        latents: of clean images, shifted and scaled, `(batch, channels, 2 * height, 2 * width)` with height and width in
            tokens.
        noise: of the shape of the latents.
        sigmas: noise levels in [0, 1], `(batch,)`; the transformers take them as timesteps.
        encoder_hidden_states: text, `(batch, text, dim)`.
        pooled_projections: pooled text, `(batch, dim)`.
        guidance: guidance scale passed to guidance-distilled transformers.
    """
    level = sigmas.view(-1, 1, 1, 1).to(latents.dtype)
    noisy = (1 - level) * latents + level * noise
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    inputs = {
        "hidden_states": pack_latents(noisy),
        "encoder_hidden_states": encoder_hidden_states,
        "pooled_projections": pooled_projections,
        "timestep": sigmas,
        "img_ids": image_ids(height, width, latents.device),
        "txt_ids": torch.zeros(encoder_hidden_states.shape[1], 3, device=latents.device),
        "guidance": latents.new_full((latents.shape[0],), guidance) if student.config.guidance_embeds else None,
    }
    compared = compared_attention(student)
    with torch.no_grad():
        teacher_tokens, teacher_attention = _with_attention(teacher, compared, inputs)
    student_tokens, student_attention = _with_attention(student, compared, inputs)
    student_prediction, teacher_prediction = (
        unpack_latents(tokens, height, width) for tokens in (student_tokens, teacher_tokens)
    )

    flow_matching_loss = F.mse_loss(student_prediction.float(), (noise - latents).float())
    prediction_loss = F.mse_loss(student_prediction.float(), teacher_prediction.float())
    attention_losses = [
        F.mse_loss(student_attention[name].float(), teacher_attention[name].float()) for name in compared
    ]
    attention_loss = torch.stack(attention_losses).mean() if compared else flow_matching_loss.new_zeros(())
    return ClearDistillationOutput(
        flow_matching_loss + PREDICTION_WEIGHT * prediction_loss + ATTENTION_WEIGHT * attention_loss,
        flow_matching_loss,
        prediction_loss,
        attention_loss,
        student_prediction,
        teacher_prediction,
    )


class ClearDistillation(nn.Module):
    """A student and its teacher as one module whose forward returns the losses, for DDP, FSDP and DeepSpeed to wrap.

    Args:
        student: FLUX transformer with CLEAR attention.
        teacher: the same model with full attention. It is not a submodule: it is neither trained nor sharded nor saved.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        self._teacher = [teacher]

    def forward(self, **batch) -> ClearDistillationOutput:
        """Losses of a batch; the arguments are those of [`distillation_losses`] after the models."""
        return distillation_losses(self.student, *self._teacher, **batch)


def _with_attention(transformer: nn.Module, names: list[str], inputs: dict) -> tuple[torch.Tensor, dict]:
    """Prediction of a transformer, and outputs of its named attention layers before the output projection."""
    outputs = {}

    def keep(name):
        # The first call counts: a checkpointed block is called again in the backward pass.
        return lambda module, arguments, output: outputs.setdefault(name, output)

    handles = [transformer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        return transformer(**inputs, return_dict=False)[0], outputs
    finally:
        for handle in handles:
            handle.remove()
