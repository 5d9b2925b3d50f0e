# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Training of the region proposal network on pseudo-labels (arXiv 2509.16944): the base is run, not trained."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer

from hf_attn.hub import HubTrainerMixin
from hf_attn.training.evaluation import ExactEvaluationMixin

from .first_pass import check_base, run_first_pass, unwrapped_base
from .modeling_sd_rpn import IGNORE_INDEX
from .prompts import encode_prompts, pad_to_square, read_prompt


if TYPE_CHECKING:
    from PIL.Image import Image


#: number of pixels, a square, to which images for Qwen2.5-VL are resized for labels and training: 24x24 tokens
QWEN_PIXELS = 576 * 28 * 28
#: colour of their padding
QWEN_PADDING = (127, 127, 127)


def labelling_inputs(
    processor: ProcessorMixin,
    config: PreTrainedConfig,
    images: Sequence["Image"],
    questions: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Inputs of a base as pseudo-labels are made and learnt with: one image a prompt, all of the same grid.

    Images for Qwen2.5-VL are padded to a square of 24x24 tokens; at inference they keep their shape.

    Args:
        processor: of the base.
        config: of the base.
        images: RGB images.
        questions: one for each image, in the form of [`~hf_attn.modeling.sd_rpn.prompts.read_prompt`].
    """
    if config.model_type == "qwen2_5_vl":
        images = [pad_to_square(image.convert("RGB"), QWEN_PADDING) for image in images]
        processor = copy.copy(processor)
        processor.image_processor = copy.copy(processor.image_processor)
        unit = processor.image_processor.patch_size * processor.image_processor.merge_size
        pixels = QWEN_PIXELS * unit**2 // 28**2
        processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    prompts = [read_prompt(processor, question, image) for question, image in zip(questions, images, strict=True)]
    return encode_prompts(processor, config, prompts)


class RoiCollator:
    """Makes batches for [`SdRpnTrainer`] of rows with `image`, `question` and `roi_labels`.

    Args:
        processor: of the base.
        config: of the base.
    """

    def __init__(self, processor: ProcessorMixin, config: PreTrainedConfig):
        self.processor, self.config = processor, config

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Inputs of the base's first pass and `roi_target_map`, a tensor of labels `(rows, columns)` for each prompt.

        The query of the map is the last token of the prompt, the one before the answer; the answer itself is not needed,
        because the map does not depend on what follows its query.

        Raises:
            ValueError: if a column is missing.
        """
        missing = {"image", "question", "roi_labels"} - set(rows[0])
        if missing:
            raise ValueError(
                f"The rows have no {', '.join(sorted(missing))}; they have {', '.join(sorted(rows[0]))}. "
                "Create a dataset with these columns by scripts/make_sd_rpn_labels.py."
            )
        images, questions = ([row[name] for row in rows] for name in ("image", "question"))
        inputs = labelling_inputs(self.processor, self.config, images, questions)
        return {**inputs, "roi_target_map": [torch.as_tensor(row["roi_labels"], dtype=torch.long) for row in rows]}


class SdRpnTrainer(ExactEvaluationMixin, HubTrainerMixin, Trainer):
    """Trainer of the region proposal network.

    The base runs its first pass in front of the network, outside of the model that is trained, saved and shared among
    processes. The loss is the mean over the labelled cells of all batches of an optimizer step, so that accumulating
    gradients over small batches equals one large batch.

    Args:
        args, kwargs: arguments of [`~transformers.Trainer`]; the model is an [`SdRpnModel`], the collator a
            [`RoiCollator`].
        base: the model that the network branches off; it is moved to the device and put in eval mode.

    Raises:
        ValueError: if the network is for another base.
    """

    def __init__(self, *args, base: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.accelerator.unwrap_model(self.model).config
        base = unwrapped_base(base)
        check_base(config, base)
        self.branch_layer = config.branch_layer
        self.dtype = self.accelerator.unwrap_model(self.model).dtype
        self.base = base.eval().to(self.args.device)
        # The collator makes the inputs of the base.
        self.args.remove_unused_columns = False
        self.label_names = ["roi_target_map"]
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # Trainer counts the entries of "labels".
        labels = [torch.cat([labels.flatten() for labels in batch["roi_target_map"]]) for batch in batch_samples]
        return super()._get_num_items_in_batch([{"labels": each} for each in labels], device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the cells that are not ignored; see [`~transformers.Trainer.compute_loss`]."""
        inputs = dict(inputs)
        labels = inputs.pop("roi_target_map")
        first = run_first_pass(self.base, self.branch_layer, **inputs)
        inputs = {**first.rpn_inputs(dtype=self.dtype), "roi_target_map": labels}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def first_samples(self, inputs: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The batch with nothing to find in what follows its first samples; some processors join the patches of all images."""
        targets = inputs["roi_target_map"]
        ignored = [torch.full_like(target, IGNORE_INDEX) for target in targets[number:]]
        return {**inputs, "roi_target_map": [*targets[:number], *ignored]}


__all__ = ["RoiCollator", "SdRpnTrainer", "labelling_inputs"]
