"""Pseudo-labels from a base model: it answers a question, and its attention shows which region the answer is based on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from hf_attn.modeling.sd_rpn.first_pass import execution_device
from hf_attn.modeling.sd_rpn.training import labelling_inputs

from .answer_attention import AttentionRecipe, answer_attention
from .dataset import label_row


if TYPE_CHECKING:
    from PIL.Image import Image


#: instruction for short answers that the questions of LLaVA's data end with
SHORT_ANSWER = "Answer the question using a single word or phrase."
#: the question that Qwen2.5-VL gets while its attention to photographs is collected, in our words; the official script
#: requests boxes in another format
BOX_REQUEST = (
    "Give the bounding boxes of the region that the question is about as plain text, one box per line: "
    "x_min y_min x_max y_max label."
)


@torch.no_grad()
def label_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence["Image"],
    questions: Sequence[str],
    recipe: AttentionRecipe,
    *,
    asked: Sequence[str] | None = None,
    max_new_tokens: int = 128,
) -> list[dict[str, Any] | None]:
    """Let a base answer greedily, and label the images by the attention of its answers.

    Args:
        model: LLaVA or Qwen2.5-VL for conditional generation.
        processor: its processor.
        images: one for each question.
        questions: questions to label.
        recipe: whose attention, and by which rule.
        asked: questions to ask instead while the attention is collected.
        max_new_tokens: longest answer.

    Returns:
        For each image a row of [`~hf_attn.modeling.sd_rpn.labels.dataset.label_features`], or `None` if the answer is a
        single token, which has no attention.
    """
    inputs = labelling_inputs(processor, model.config, images, asked or questions)
    inputs = {name: tensor.to(execution_device(model)) for name, tensor in inputs.items()}
    sequences = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        # An image token would be taken for an image when the answer is read again.
        suppress_tokens=[model.config.image_token_id],
    )
    answers = [_to_the_end(model, answer) for answer in sequences[:, inputs["input_ids"].shape[1] :]]
    attentions = answer_attention(model, inputs, answers, recipe)
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    return [
        None
        if attention is None
        else label_row(
            image,
            question,
            text.strip(),
            attention.grounding.cpu(),
            attention.sink.cpu(),
            image.size,
            rule=recipe.rule,
            sink_threshold=recipe.sink_threshold,
        )
        for image, question, text, attention in zip(images, questions, texts, attentions, strict=True)
    ]


def _to_the_end(model: PreTrainedModel, answer: torch.Tensor) -> torch.Tensor:
    """The answer up to and including its end token, followed by padding."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=answer.device).flatten()
    is_end = torch.isin(answer, ends)
    return answer[: int(is_end.int().argmax()) + 1] if is_end.any() else answer


__all__ = ["BOX_REQUEST", "SHORT_ANSWER", "label_images"]
