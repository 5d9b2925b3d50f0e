"""Recordings and transcripts -> inputs of the classifier."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .audio import read_speech
from .features import decibels, deltas, mel_power


class SpeechImageFeatureExtractor(SequenceFeatureExtractor):
    """Recordings as images of three channels: log-Mel spectrogram, delta and delta-delta.

        extractor = SpeechImageFeatureExtractor()
        inputs = extractor({"array": samples, "sampling_rate": 44100})
        inputs["pixel_values"]  # (1, 3, 224, 224)

    The spectrogram is in decibels below its maximum. The image is resized bilinearly (with antialiasing, as recordings have
    thousands of frames), scaled to [0, 1] and normalised as the vision encoder expects it.

    Args:
        feature_size (`int`): Mel bands.
        sampling_rate (`int`): in Hz; recordings at other rates are resampled.
        n_fft (`int`): samples of a frame.
        hop_length (`int`): samples from one frame to the next.
        top_db (`float`): dynamic range in decibels; softer values are raised to its minimum.
        delta_width (`int`): frames that a derivative is taken over.
        size (`dict`): `height` and `width` of the image.
        image_mean (`list[float]`): mean of each channel, subtracted.
        image_std (`list[float]`): standard deviation of each channel, divided by.
        mix_channels (`bool`): average the channels of recordings that have several, which are refused otherwise.
        padding_value (`float`): unused, as images are not padded.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        feature_size: int = 224,
        sampling_rate: int = 16000,
        n_fft: int = 2048,
        hop_length: int = 512,
        top_db: float = 80.0,
        delta_width: int = 9,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD),
        mix_channels: bool = False,
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        for name, value in {
            "feature_size": feature_size,
            "sampling_rate": sampling_rate,
            "hop_length": hop_length,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if delta_width < 3 or delta_width % 2 == 0:
            raise ValueError(f"delta_width must be odd and at least 3, got {delta_width}.")
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.top_db = top_db
        self.delta_width = delta_width
        self.size = dict(size) if size is not None else {"height": 224, "width": 224}
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"size must have height and width, got {self.size}.")
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.mix_channels = mix_channels

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoFeatureExtractor"):
        """Do nothing: transformers would copy the source file into saved folders."""

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make images.

        Args:
            raw_speech: a recording, see [`hf_attn.modeling.dementia_fusion.audio.read_speech`], or a list of them. A list of
                numbers is a recording.
            sampling_rate: sampling rate of arrays, which do not say it.
            return_tensors: only `"pt"`.

        Returns:
            `pixel_values`, `(batch, 3, height, width)`.

        Raises:
            ValueError: for invalid recordings; the message says which and why.
        """
        if return_tensors != "pt":
            raise ValueError(
                "SpeechImageFeatureExtractor returns only PyTorch tensors (return_tensors='pt'), got "
                f"{return_tensors!r}."
            )
        recordings = raw_speech if is_batch(raw_speech) else [raw_speech]
        if not len(recordings):
            raise ValueError("There are no recordings.")
        images = []
        for index, recording in enumerate(recordings):
            try:
                samples = read_speech(recording, self.sampling_rate, sampling_rate, self.mix_channels)
                images.append(self.image(self.channels(samples)))
            except ValueError as error:
                where = f"Recording {index}: " if len(recordings) > 1 else ""
                raise ValueError(f"{where}{error}") from error
        return BatchFeature({"pixel_values": torch.stack(images)})

    def channels(self, samples: np.ndarray) -> np.ndarray:
        """Spectrogram in decibels, delta and delta-delta, `(3, feature_size, frames)`, of `(samples,)` at `sampling_rate`.

        Raises:
            ValueError: if there are fewer frames than `delta_width`.
        """
        shortest = (self.delta_width - 1) * self.hop_length
        if len(samples) < shortest:
            raise ValueError(
                f"The recording is too short: {len(samples)} samples, {len(samples) / self.sampling_rate:.3f} s. At least "
                f"{shortest} ({shortest / self.sampling_rate:.3f} s) are needed for the derivatives over time."
            )
        power = mel_power(samples, self.sampling_rate, self.feature_size, self.n_fft, self.hop_length)
        return deltas(decibels(power, dynamic_range=self.top_db), self.delta_width)

    def image(self, channels: np.ndarray) -> torch.Tensor:
        """Channels `(3, feature_size, frames)` as a normalised image `(3, height, width)`.

        Raises:
            ValueError: if all of them are equal, as they are of a recording that is almost silent.
        """
        if channels.max() == channels.min():
            raise ValueError("The recording is silent: it is too quiet for a spectrogram.")
        size = (self.size["height"], self.size["width"])
        image = torch.from_numpy(channels).float()[None]
        image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)[0]
        image = (image - image.min()) / (image.max() - image.min())
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (image - mean) / std


def is_batch(recordings: Any) -> bool:
    """Whether these are several recordings: a list, but not one of numbers."""
    return isinstance(recordings, list | tuple) and not (
        len(recordings) and np.isscalar(recordings[0]) and not isinstance(recordings[0], str | bytes)
    )


class DementiaFusionProcessor(ProcessorMixin):
    """Feature extractor of recordings and tokenizer of transcripts.

        processor = DementiaFusionProcessor(SpeechImageFeatureExtractor(), AutoTokenizer.from_pretrained("bert-base-uncased"))
        inputs = processor(audio="interview.wav", text="there is a boy on a stool")
        model(**inputs).logits

    Args:
        feature_extractor ([`SpeechImageFeatureExtractor`]): for the recordings.
        tokenizer (`PreTrainedTokenizerBase`): for the transcripts.
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Do nothing: transformers would copy the source file into saved folders."""

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.feature_extractor.model_input_names]

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **text_kwargs,
    ) -> BatchFeature:
        """Prepare recordings, transcripts or both.

        Args:
            audio: a recording or a list of them, see [`SpeechImageFeatureExtractor`].
            text: a transcript, or a list of them.
            sampling_rate: sampling rate of recordings that are arrays.
            return_tensors: only `"pt"`.
            padding: how transcripts are padded.
            text_kwargs: other arguments of the tokenizer, such as `truncation`.

        Returns:
            `pixel_values` and the tokens.

        Raises:
            ValueError: for empty transcripts, as many recordings as transcripts not being there, and transcripts that are
                longer than the tokenizer allows without `truncation`.
        """
        if audio is None and text is None:
            raise ValueError("Pass audio, text or both.")
        inputs = {}
        if text is not None:
            texts = list(text) if isinstance(text, list | tuple) else [text]
            wrong = next((transcript for transcript in texts if not isinstance(transcript, str)), None)
            if wrong is not None:
                raise ValueError(f"A transcript must be a string, got a {type(wrong).__name__}: {wrong!r}.")
            empty = [index for index, transcript in enumerate(texts) if not transcript.strip()]
            if empty or not texts:
                raise ValueError(f"Empty transcripts: {', '.join(map(str, empty)) if texts else 'all'}.")
            number = len(audio) if is_batch(audio) else 1
            if audio is not None and number != len(texts):
                raise ValueError(f"Got {number} recordings but {len(texts)} transcripts.")
            inputs |= self.tokenizer(texts, return_tensors=return_tensors, padding=padding, **text_kwargs)
            length, longest = inputs["input_ids"].shape[1], self.tokenizer.model_max_length
            if length > longest:
                raise ValueError(
                    f"A transcript has {length} tokens, but the text encoder supports at most {longest}. Pass "
                    "truncation=True to truncate it."
                )
        if audio is not None:
            inputs |= self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors)
        return BatchFeature(inputs)


__all__ = ["DementiaFusionProcessor", "SpeechImageFeatureExtractor"]
