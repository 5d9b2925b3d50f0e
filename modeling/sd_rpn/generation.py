"""Two-pass answers of SD-RPN: find the region that a question is about, encode it again, answer with both."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .first_pass import ImageCells, check_base, execution_device, own_weights, run_first_pass, unwrapped_base
from .modeling_sd_rpn import SdRpnModel
from .overlay import overlay
from .prompts import ImagesLike, PromptLike, encode_prompts, is_chat, pad_token, read_prompt
from .regions import UNASKED_LEFT_OUT_ABOVE, Box, Region, asked_tokens, llava_regions, qwen_regions
from .second_pass import EncodedImage, encode_crops, second_pass_inputs


if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class FocusedImage:
    """What SD-RPN found in an image.

    Attributes:
        image: the original image.
        roi_map: probabilities `(rows, columns)` that a cell belongs to the region of interest, before the blur.
        threshold: of the blurred map.
        regions: the cropped regions.
        crops: the crops, as cut out of the image.
        num_crop_tokens: number of tokens that the crops add to the prompt, those that mark their start and end not counted.
        padded: whether the map is of the image padded to a square.
    """

    image: "Image"
    roi_map: torch.Tensor = field(repr=False)
    threshold: float
    regions: list[Region]
    crops: list["Image"]
    num_crop_tokens: int
    padded: bool

    @property
    def boxes(self) -> list[Box]:
        """The regions in pixels of the image, `(x0, y0, x1, y1)` with ends exclusive."""
        return [region.box for region in self.regions]

    def overlay(self, opacity: float = 0.55) -> "Image":
        """The image under its RoI map, with the boxes."""
        return overlay(self.image, self.roi_map, self.boxes, self.padded, opacity)


@dataclass(frozen=True)
class FocusedAnswer:
    """An answer with where the model looked.

    Attributes:
        texts: the answer, or several with `num_return_sequences`.
        images: results for the images of the prompt, in order; empty for a prompt without images.
    """

    texts: list[str]
    images: list[FocusedImage]

    @property
    def text(self) -> str:
        return self.texts[0]


@dataclass(frozen=True)
class FocusedInputs:
    """Prompts with crops.

    Attributes:
        model_inputs: keyword arguments of the base's `generate`.
        images: of each prompt.
    """

    model_inputs: dict
    images: list[list[FocusedImage]]


class SdRpnGenerator:
    """Answers questions about images in two passes of a base that is not changed.

        generator = SdRpnGenerator(base, rpn, processor)
        answer = generator.generate("What does the sign say?", "street.jpg", task="textvqa", max_new_tokens=20)[0]
        print(answer.text, answer.images[0].boxes)
        answer.images[0].overlay().save("where.png")

    The first pass runs the base's layers up to the branch and the network; the second answers with the tokens of the crop
    behind those of the image. Without a region the answer is that of the base alone. With one, Qwen2.5-VL reads of a large image
    only those tokens again that the question looks at, see
    [`~hf_attn.modeling.sd_rpn.regions.asked_tokens`].

    Several threads may use one generator.

    Args:
        base: LLaVA, LLaVA-Next or Qwen2.5-VL for conditional generation, also with PEFT adapters in its layers.
        rpn: a region proposal network for this base.
        processor: the base's processor.

    Raises:
        ValueError: if the network is for another base.
    """

    def __init__(self, base: PreTrainedModel, rpn: SdRpnModel, processor: ProcessorMixin):
        base = unwrapped_base(base)
        check_base(rpn.config, base)
        self.base = base
        self.rpn = rpn
        self.processor = processor

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        images: ImagesLike = None,
        *,
        task: str | None = None,
        threshold: float | None = None,
        masked: bool = True,
        **generate_kwargs,
    ) -> list[FocusedAnswer]:
        """Answer a batch of prompts.

        Args:
            prompts: a prompt or several: a question, a text with image placeholders, or the messages of a chat.
            images: for one prompt an image or a list of them; for several one entry each, which may be none, an image or a
                list. An image is a Pillow image, a path, a URL or base64, of any size.
            task, threshold, masked: see [`prepare`].
            generate_kwargs: for the base's `generate`: `max_new_tokens`, `streamer`, `num_beams`...

        Returns:
            An answer for each prompt.
        """
        focused = self.prepare(prompts, images, task=task, threshold=threshold, masked=masked)
        generated = self.base.generate(**focused.model_inputs, **generate_kwargs)
        # A dictionary if the generation configuration requests one.
        sequences = getattr(generated, "sequences", generated)
        new_tokens = sequences[:, focused.model_inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        per_prompt = len(texts) // len(focused.images)
        return [
            FocusedAnswer(texts[index * per_prompt : (index + 1) * per_prompt], found)
            for index, found in enumerate(focused.images)
        ]

    def prepare(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        images: ImagesLike = None,
        *,
        task: str | None = None,
        threshold: float | None = None,
        masked: bool = True,
    ) -> FocusedInputs:
        """The first pass: prompts and images as in [`generate`], made into inputs of the base's `generate`.

        Args:
            prompts, images: see [`generate`].
            task: take the threshold of the paper's evaluation on this task: `textvqa`, `docvqa`, `vstar`...
            threshold: of the blurred RoI map; a negative one is a fraction of its maximum. That of the configuration's
                `default` if neither is given.
            masked: see [`~hf_attn.modeling.sd_rpn.regions.llava_regions`].

        Raises:
            ValueError: if prompts and images do not fit, if both `task` and `threshold` are given, or if either is unknown
                or out of range.
        """
        threshold = self._threshold(task, threshold)
        if isinstance(prompts, str) or is_chat(prompts):
            prompts, images = [prompts], [images]
        elif images is None:
            images = [None] * len(prompts)
        if not prompts:
            raise ValueError("There are no prompts.")
        if not isinstance(images, list | tuple) or len(images) != len(prompts):
            found = len(images) if isinstance(images, list | tuple) else 1
            raise ValueError(f"Got {len(prompts)} prompts but {found} entries of images: pass one per prompt.")
        read = [read_prompt(self.processor, prompt, given) for prompt, given in zip(prompts, images, strict=True)]
        inputs = encode_prompts(self.processor, self.base.config, read)
        return self.focus(inputs, [prompt.images for prompt in read], threshold, masked)

    @torch.no_grad()
    def focus(
        self, inputs: dict, images: Sequence[Sequence["Image"]], threshold: float, masked: bool = True
    ) -> FocusedInputs:
        """The first pass on inputs that a processor has made.

        Args:
            inputs: `input_ids` and `attention_mask`, `(batch, sequence)`, and what the base takes beside them:
                `pixel_values`, `image_sizes`, `image_grid_thw`, `mm_token_type_ids`.
            images: the original images of each prompt, from which crops are cut.
            threshold, masked: see [`prepare`].
        """
        base = self.base
        device = execution_device(base)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        features = self._image_features(inputs)
        cells, maps, asked = self._roi_maps(inputs, features) if features else ([], [], [])
        originals = [image for of_prompt in images for image in of_prompt]
        if len(originals) != len(cells):
            raise ValueError(
                f"The prompts have the tokens of {len(cells)} images, but {len(originals)} images were passed."
            )

        regions = [
            self._regions(roi_map, threshold, image.size, masked)
            for roi_map, image in zip(maps, originals, strict=True)
        ]
        cut = [
            [image.crop(region.box) for region in of_image] for image, of_image in zip(originals, regions, strict=True)
        ]
        flat = iter(
            encode_crops(base, self.processor.image_processor, [crop for of_image in cut for crop in of_image])
        )
        crops = [
            [crop.keep(region.kept_tokens(crop.grid)) for region, crop in zip(of_image, flat, strict=False)]
            for of_image in regions
        ]
        found: list[list[FocusedImage]] = [[] for _ in images]
        for index, image in enumerate(cells):
            found[image.row].append(
                FocusedImage(
                    image=originals[index],
                    roi_map=maps[index],
                    threshold=threshold,
                    regions=regions[index],
                    crops=cut[index],
                    num_crop_tokens=sum(int(crop.kept.sum()) for crop in crops[index]),
                    padded=base.config.model_type == "llava",
                )
            )
        encoded = [EncodedImage.whole(feature, image.grid) for feature, image in zip(features, cells, strict=True)]
        # An image without a crop is processed as by the base alone.
        encoded = [
            image.keep(tokens) if of_image and tokens is not None else image
            for image, of_image, tokens in zip(encoded, crops, asked, strict=True)
        ]
        model_inputs = second_pass_inputs(
            base,
            inputs["input_ids"],
            inputs["attention_mask"],
            cells,
            encoded,
            crops,
            pad_token(self.processor.tokenizer),
        )
        return FocusedInputs(model_inputs, found)

    def _threshold(self, task: str | None, threshold: float | None) -> float:
        if threshold is None:
            return self.rpn.config.threshold(task)
        if task is not None:
            raise ValueError("task chooses a threshold: pass either task or threshold.")
        if isinstance(threshold, torch.Tensor) and threshold.ndim == 0:
            threshold = threshold.item()
        is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
        if not is_number or not -1 < threshold < 1:
            raise ValueError(
                "threshold must be a number between -1 and 1 (a probability or, if negative, a fraction of the map's "
                f"maximum), got {threshold!r}."
            )
        return float(threshold)

    def _image_features(self, inputs: dict) -> list[torch.Tensor]:
        """Features `(tokens, hidden_size)` of each image; both passes use them."""
        names = ("pixel_values", "image_sizes", "image_grid_thw")
        pixels = {name: inputs[name] for name in names if name in inputs}
        if not pixels:
            return []
        with own_weights(self.base.model):
            return list(self.base.get_image_features(**pixels).pooler_output)

    def _roi_maps(
        self, inputs: dict, features: list[torch.Tensor]
    ) -> tuple[list[ImageCells], list[torch.Tensor], list[torch.Tensor | None]]:
        """The images as they stand in the prompts, their maps of probabilities, and which of their tokens the question
        looks at, where only those are read again.
        """
        first = run_first_pass(
            self.base,
            self.rpn.config.branch_layer,
            **{name: tensor for name, tensor in inputs.items() if name != "pixel_values"},
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
        )
        rpn_inputs = first.rpn_inputs(self.rpn.device, self.rpn.dtype)
        asked: list[torch.Tensor | None] = [None] * len(first.images)
        is_qwen = self.base.config.model_type == "qwen2_5_vl"
        large = [i for i, image in enumerate(first.images) if is_qwen and image.num_tokens > UNASKED_LEFT_OUT_ABOVE]
        if large:
            positions = first.question_positions().to(self.rpn.device)
            by_query = self.rpn(**rpn_inputs, query_positions=positions).logits
            logits = by_query[:, -1]
            cells = first.cells_of_images()
            for i in large:
                image = first.images[i]
                behind = positions[image.row] >= image.start + image.num_tokens
                asked[i] = asked_tokens(by_query[image.row, behind, cells[i]])
        else:
            logits = self.rpn(**rpn_inputs).logits
        return first.images, [roi_map.sigmoid().cpu() for roi_map in first.maps(logits)], asked

    def _regions(
        self, roi_map: torch.Tensor, threshold: float, image_size: tuple[int, int], masked: bool
    ) -> list[Region]:
        config = self.base.config
        if config.model_type == "qwen2_5_vl":
            return qwen_regions(roi_map, threshold, image_size)
        # LLaVA-Next resizes the whole image to a square instead of padding it.
        encoder_size = config.vision_config.image_size if config.model_type == "llava" else None
        return llava_regions(roi_map, threshold, image_size, encoder_size, masked)
