"""Recordings of speech, from files and from what `datasets` gives, as one channel at one sampling rate."""

from collections.abc import Mapping
from io import BytesIO
from math import gcd
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np


def read_speech(audio: Any, sampling_rate: int, own_rate: int | None = None, mix_channels: bool = False) -> np.ndarray:
    """A recording as `(samples,)`, float32, at a sampling rate.

    Args:
        audio: a path; the bytes of a file; an array or tensor `(samples,)` or `(channels, samples)`; or a dictionary with `array`
            (or `raw`) and `sampling_rate`, `path` or `bytes`, as `datasets.Audio` gives it, decoded or not.
        sampling_rate: in Hz, to which recordings at other rates are resampled.
        own_rate: the sampling rate of an array, which does not say it.
        mix_channels: average the channels of a recording that has several.

    Raises:
        ValueError: for recordings that cannot be read, are empty, silent or not finite, have several channels, and arrays
            whose sampling rate is not known.
        ImportError: if a file needs soundfile (the extra `speech`).
    """
    samples, rate = _decode(audio)
    rate = rate if rate is not None else own_rate
    if rate is None:
        raise ValueError(
            "The sampling rate of an array is unknown. Pass sampling_rate; other rates are resampled to the "
            f"{sampling_rate} Hz of the features."
        )
    if not isinstance(rate, Real) or rate < 1 or rate != int(rate):
        raise ValueError(f"The sampling rate must be a positive integer in Hz, got {rate!r}.")
    samples = _one_channel(samples, mix_channels)
    if not len(samples):
        raise ValueError("The recording is empty.")
    if not np.isfinite(samples).all():
        raise ValueError("The recording contains NaN or infinity.")
    if samples.max() == samples.min():
        raise ValueError("The recording is silent: all its samples are the same.")
    if rate != sampling_rate:
        samples = resample(samples, int(rate), sampling_rate)
    return samples


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample `(samples,)` with a polyphase filter that keeps the frequencies of both rates."""
    from scipy.signal import resample_poly

    common = gcd(rate, new_rate)
    return resample_poly(samples, new_rate // common, rate // common).astype(np.float32)


def _decode(audio: Any) -> tuple[np.ndarray, int | None]:
    if hasattr(audio, "get_all_samples"):  # a decoder, which `datasets` returns if torchcodec is installed
        decoded = audio.get_all_samples()
        return np.asarray(decoded.data), decoded.sample_rate
    if isinstance(audio, Mapping):
        samples = audio.get("array", audio.get("raw"))
        if samples is not None:
            if audio.get("sampling_rate") is None:
                raise ValueError("A dictionary with an array also needs a sampling_rate.")
            return _as_float(samples), audio["sampling_rate"]
        for name in ("bytes", "path"):
            if audio.get(name) is not None:
                return _read_file(audio[name])
        raise ValueError(
            "A recording must be a dictionary with array and sampling_rate, with path, or with bytes, got "
            f"{', '.join(map(str, audio))}."
        )
    if isinstance(audio, str | Path | bytes):
        return _read_file(audio)
    return _as_float(audio), None


def _as_float(samples: Any) -> np.ndarray:
    samples = samples.detach().cpu().numpy() if hasattr(samples, "detach") else np.asarray(samples)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    if samples.dtype.kind != "f":
        raise ValueError(f"A recording must contain signed integers or floating-point numbers, got {samples.dtype}.")
    return samples.astype(np.float32)


def _read_file(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    name = "The recording" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"There is no file {name}.")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Reading audio files needs soundfile: `pip install 'hf_attn[speech]'`.") from error
    try:
        samples, rate = soundfile.read(BytesIO(source) if isinstance(source, bytes) else source, dtype="float32")
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as audio: {error}") from error
    return samples.T, rate


def _one_channel(samples: np.ndarray, mix_channels: bool) -> np.ndarray:
    if samples.ndim not in (1, 2):
        raise ValueError(f"A recording must have the shape (samples,) or (channels, samples), got {samples.shape}.")
    if samples.ndim == 1:
        return samples
    if samples.shape[0] > samples.shape[1]:
        raise ValueError(f"A recording with channels must have the shape (channels, samples), got {samples.shape}.")
    if samples.shape[0] > 1 and not mix_channels:
        raise ValueError(
            f"The recording has {samples.shape[0]} channels, possibly one per speaker. Pass the channel to classify, "
            "or set mix_channels=True for the mean of all."
        )
    return samples.mean(0)
