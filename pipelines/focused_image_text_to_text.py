"""The pipeline `focused-image-text-to-text`: answers about images by a model that looks twice (SD-RPN)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Pipeline

from hf_attn.modeling.sd_rpn.generation import FocusedAnswer, SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from hf_attn.modeling.sd_rpn.prompts import is_chat


#: where the network is in the folder of a saved pipeline
_RPN_FOLDER = "rpn"


class FocusedImageTextToTextPipeline(Pipeline):
    """Answers about images with a LLaVA, LLaVA-Next or Qwen2.5-VL and a region proposal network for it.

        pipe = pipeline("focused-image-text-to-text", model="llava-hf/llava-1.5-7b-hf", rpn="your-name/rpn")
        answer = pipe("street.jpg", text="What does the sign say?", focus_task="textvqa", max_new_tokens=20)
        answer["generated_text"], answer["images"][0].boxes
        answer["images"][0].overlay().save("where.png")

    `images` and `text` are those of transformers' `image-text-to-text`: an image with a text, or lists of both, or the
    messages of one or more chats as `text`; or, as a first argument, a dictionary, list, dataset or generator of
    `{"images": ..., "text": ...}`. A text is a question, or what the base expects with its image placeholders. An entry of
    a list of images may be a list, or `None` for a text without an image. A model given as an object needs its `processor`
    given too.

    Each result is a dictionary: `input_text`; `generated_text`, without the prompt, a list if `num_return_sequences` asks
    for several; and `images`, a [`~hf_attn.modeling.sd_rpn.generation.FocusedImage`] with the RoI map, the boxes and
    the crops for each image.

    Parameters, for the call or the constructor:

    - **rpn** (constructor only): a [`SdRpnModel`], its Hub id or its folder. It can be left out for a model that
      `save_pretrained` of this pipeline has saved, in whose folder it is.
    - **focus_task** (`str`): use the threshold of the paper's evaluation on this task, such as `"textvqa"`.
    - **threshold** (`float`): of the RoI map; a negative one is a fraction of its maximum.
    - **masked** (`bool`, `True`): of several regions, keep only the tokens inside them.
    - **batch_size** (`int`, 1): prompts that are answered together.
    - **generate_kwargs** (`dict`), or any keyword argument of `generate` such as `max_new_tokens` (256) and `streamer`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args, rpn: SdRpnModel | str | Path | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if rpn is None:
            rpn = self._rpn_beside_model()
        if self.processor is None:
            raise ValueError("The model was passed as an object, so its processor must be passed too: processor=...")
        if not isinstance(rpn, SdRpnModel):
            rpn = SdRpnModel.from_pretrained(rpn, dtype=self.model.dtype)
        # A model object may come from its training.
        self.model.eval()
        self.generator = SdRpnGenerator(self.model, rpn.to(self.device).eval(), self.processor)

    def _rpn_beside_model(self) -> SdRpnModel:
        try:
            return SdRpnModel.from_pretrained(self.model.name_or_path, subfolder=_RPN_FOLDER, dtype=self.model.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                "focused-image-text-to-text needs the region proposal network of the model: pass rpn, an SdRpnModel, "
                "its Hub id or its folder."
            ) from error

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Save model, processor and, in the folder `rpn`, the region proposal network.

        Raises:
            ValueError: for `push_to_hub`, which would make several repositories of one pipeline.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "Save the pipeline to a folder, and upload the folder: huggingface_hub.upload_folder(...)."
            )
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        self.generator.rpn.save_pretrained(Path(save_directory, _RPN_FOLDER))

    def __call__(self, images=None, text=None, batch_size: int | None = None, **kwargs):
        """Answer one or more prompts; see the class."""
        inputs, is_single = _read_inputs(images, text)
        if isinstance(inputs, list):
            size = batch_size if batch_size is not None else self._batch_size if self._batch_size is not None else 1
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"batch_size must be a number of prompts, at least 1; got {size!r}.")
            batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
            answers = [answer for batch in super().__call__(batches, batch_size=1, **kwargs) for answer in batch]
            return answers[0] if is_single else answers
        return self._one_by_one(inputs, super().__call__, kwargs)

    def _one_by_one(self, inputs, call, kwargs) -> Iterator[dict]:
        for entry in inputs:
            yield call([[_checked(entry)]], batch_size=1, **kwargs)[0][0]

    def _sanitize_parameters(
        self, focus_task=None, threshold=None, masked=None, generate_kwargs: dict | None = None, **kwargs
    ):
        chosen = {"task": focus_task, "threshold": threshold, "masked": masked}
        forward = {name: value for name, value in chosen.items() if value is not None}
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        if generate_kwargs:
            forward["generate_kwargs"] = generate_kwargs
        return {}, forward, {}

    def preprocess(self, batch: list[Mapping[str, Any]]) -> dict:
        return {"batch": batch}

    def _forward(self, inputs: dict, generate_kwargs: dict | None = None, **focus) -> dict:
        batch = inputs["batch"]
        answers = self.generator.generate(
            [entry["text"] for entry in batch],
            [entry.get("images") for entry in batch],
            **focus,
            **self._prepare_generate_kwargs(generate_kwargs or {}),
        )
        return {"batch": batch, "answers": answers}

    def postprocess(self, outputs: dict) -> list[dict]:
        return [_result(entry, answer) for entry, answer in zip(outputs["batch"], outputs["answers"], strict=True)]


def _result(entry: Mapping[str, Any], answer: FocusedAnswer) -> dict:
    generated = answer.text if len(answer.texts) == 1 else answer.texts
    return {"input_text": entry["text"], "generated_text": generated, "images": answer.images}


def _read_inputs(images, text) -> tuple[Any, bool]:
    """A list of `{"images", "text"}`, or an iterable of them, and whether it is one prompt."""
    is_chats = isinstance(images, list | tuple) and len(images) > 0 and is_chat(images[0])
    if text is None and (is_chat(images) or is_chats):
        images, text = None, images
    if text is None:
        if isinstance(images, Mapping):
            return [_checked(images)], True
        if isinstance(images, list):
            return [_checked(entry) for entry in images], False
        if not isinstance(images, str) and (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
            return images, False
        raise ValueError("Pass a text: a question, a prompt or the messages of a chat.")
    if isinstance(text, str) or is_chat(text):
        return [{"images": images, "text": text}], True
    given = [None] * len(text) if images is None else images
    if not isinstance(given, list | tuple) or len(given) != len(text):
        raise ValueError(
            f"There are {len(text)} texts and {len(given) if isinstance(given, list | tuple) else 1} images. Pass one "
            "per text (None for a text without an image), or a list."
        )
    return [{"images": image, "text": one} for image, one in zip(given, text, strict=True)], False


def _checked(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping) or "text" not in entry:
        raise ValueError(f"An input must be a dictionary with 'text' and 'images', got {type(entry).__name__}.")
    return entry
