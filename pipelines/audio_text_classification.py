"""Pipeline `audio-text-classification`: a recording of speech and its transcript in, probabilities out."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Pipeline, pipeline
from transformers.utils import logging

from hf_attn.modeling.dementia_fusion.audio import read_speech
from hf_attn.modeling.dementia_fusion.plots import plot_transport, words_over_time
from hf_attn.pipelines.heads import check_head


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)

NOTICE = (
    "These probabilities of a research model are not a diagnosis. They are not reliable for an individual and must "
    "not be used for decisions about a person."
)


class AudioTextClassificationPipeline(Pipeline):
    """Classifies recordings with their transcripts, with a model of `AutoModelForAudioTextClassification`.

        pipe = pipeline("audio-text-classification", model="...")
        pipe({"audio": "interview.wav", "text": "there is a boy on a stool"})
        pipe("interview.wav", asr="openai/whisper-small.en")
        pipe.plot({"audio": "interview.wav", "text": "..."}).savefig("words.png")

    A recording is a path, an array with `sampling_rate`, or a dictionary `{"array": ..., "sampling_rate": ...}`, as `datasets.Audio`
    gives it; recordings at other rates are resampled. Several are a list, dataset or generator of dictionaries with `audio` and
    `text`. The result of each is a dictionary:

    - `label`, `score`: the likeliest class and its probability;
    - `probabilities`: the probability of each class;
    - `transcript`: the text that was used;
    - `notice`: that this is not a diagnosis.

    Parameters, for the call or the constructor:

    - **text** (`str`): the transcript, if the recording is not in a dictionary with it.
    - **asr** (`str` or `Pipeline`): speech recognition that makes the transcripts that are missing: a pipeline, or the id of its model.
    - **sampling_rate** (`int`): sampling rate of recordings that are arrays.
    - **truncation** (`bool`, `False`): cut off the end of transcripts that are too long, which are refused otherwise.
    - **temperature** (`float`, 1.0): divides the logits, see [`hf_attn.analysis.calibration.fit_temperature`].
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_head(self.model)
        if self.processor is None:
            raise ValueError("The model has no processor. Pass one: processor=DementiaFusionProcessor(...).")
        # For padding, when the pipeline makes batches.
        self.tokenizer, self.feature_extractor = self.processor.tokenizer, self.processor.feature_extractor
        self.model.eval()
        logger.warning_once(NOTICE)

    def __call__(self, inputs, **kwargs):
        """Classify one or more recordings; see the class."""
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, text=None, asr=None, sampling_rate=None, truncation=None, temperature=None, **unknown
    ):
        if unknown:
            raise TypeError(
                f"audio-text-classification has no parameter {', '.join(sorted(unknown))}. Parameters: text, asr, sampling_rate, "
                "truncation, temperature."
            )
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if isinstance(asr, str):
            asr = pipeline("automatic-speech-recognition", model=asr, device=self.device)
        given = {"text": text, "asr": asr, "sampling_rate": sampling_rate, "truncation": truncation}
        given = {name: value for name, value in given.items() if value is not None}
        return given, {}, {} if temperature is None else {"temperature": temperature}

    def preprocess(self, inputs, text=None, asr: Callable | None = None, sampling_rate=None, truncation=False) -> dict:
        audio = inputs
        if isinstance(inputs, Mapping) and "audio" in inputs:
            unknown = set(inputs) - {"audio", "text", "sampling_rate"}
            if unknown:
                raise ValueError(
                    "An input must be a dictionary with audio, text and sampling_rate; unknown keys: "
                    f"{', '.join(sorted(unknown))}."
                )
            audio, text = inputs["audio"], inputs.get("text", text)
            sampling_rate = inputs.get("sampling_rate", sampling_rate)
        if audio is None:
            raise ValueError("There is no recording: pass {'audio': ..., 'text': ...}.")
        if text is None:
            text = self._transcribe(audio, asr, sampling_rate)
        if not isinstance(text, str):
            raise ValueError(f"The transcript of a recording must be a string, got {text!r}.")
        model_inputs = self.processor(audio=audio, text=text, sampling_rate=sampling_rate, truncation=truncation)
        return {**model_inputs, "transcript": text}

    def _transcribe(self, audio: Any, asr: Callable | None, sampling_rate: int | None) -> str:
        if asr is None:
            raise ValueError(
                "There is no transcript: pass {'audio': ..., 'text': ...}, or a speech recognition model that "
                "transcribes the audio, asr='openai/whisper-small.en'."
            )
        extractor = self.processor.feature_extractor
        rate = getattr(getattr(asr, "feature_extractor", None), "sampling_rate", extractor.sampling_rate)
        samples = read_speech(audio, rate, sampling_rate, extractor.mix_channels)
        # Whisper hears more than 30 seconds only with timestamps.
        options = {"return_timestamps": True} if getattr(asr, "type", None) == "seq2seq_whisper" else {}
        text = asr({"raw": samples, "sampling_rate": rate}, **options)["text"].strip()
        if not text:
            raise ValueError("The speech recognition found no words. Pass a transcript.")
        return text

    def _forward(self, inputs: dict) -> dict:
        transcript = inputs.pop("transcript")
        return {"logits": self.model(**inputs).logits, "transcript": transcript}

    def postprocess(self, outputs: dict, temperature: float = 1.0) -> dict:
        (probabilities,) = (outputs["logits"].float() / temperature).softmax(-1)
        names = self.model.config.id2label
        best = int(probabilities.argmax())
        return {
            "label": names[best],
            "score": probabilities[best].item(),
            "probabilities": {names[index]: value for index, value in enumerate(probabilities.tolist())},
            "transcript": outputs["transcript"],
            "notice": NOTICE,
        }

    @torch.no_grad()
    def plot(self, inputs: Any, **kwargs) -> "Figure":
        """Draw the spectrogram of one recording, and where in it the transport sends each word.

        Args:
            inputs: the recording, as for a call.
            kwargs: `text`, `asr`, `sampling_rate` and `truncation`, as for a call.

        Raises:
            ValueError: if the model has no transport (`cross="none"`).
            ImportError: if matplotlib (the extra `plot`) is not installed.
        """
        if self.model.config.cross == "none":
            raise ValueError(
                "This model has no transport between the modalities (cross='none'), so there is nothing to draw."
            )
        options, _, _ = self._sanitize_parameters(**kwargs)
        # The arguments of the constructor apply here as well.
        options = {**self._preprocess_params, **options}
        model_inputs = self.preprocess(inputs, **options)
        model_inputs.pop("transcript")
        outputs = self.model(**{name: tensor.to(self.device) for name, tensor in model_inputs.items()})
        tokens = self.tokenizer.convert_ids_to_tokens(model_inputs["input_ids"][0].tolist())
        size, patch = (
            value if isinstance(value, list | tuple) else (value, value)
            for value in (self.model.config.vision_config.image_size, self.model.config.vision_config.patch_size)
        )
        plan = outputs.text_to_image_plan[0].double().cpu().numpy()
        moments = words_over_time(plan, size[0] // patch[0], size[1] // patch[1])

        audio, rate = inputs, options.get("sampling_rate")
        if isinstance(inputs, Mapping) and "audio" in inputs:
            audio, rate = inputs["audio"], inputs.get("sampling_rate", rate)
        extractor = self.processor.feature_extractor
        samples = read_speech(audio, extractor.sampling_rate, rate, extractor.mix_channels)
        levels = extractor.channels(samples)[0]
        return plot_transport(levels, len(samples) / extractor.sampling_rate, tokens, moments)


__all__ = ["NOTICE", "AudioTextClassificationPipeline"]
