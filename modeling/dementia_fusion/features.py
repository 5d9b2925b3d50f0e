"""Speech as an image: log-Mel spectrogram, its delta and its delta-delta, in the conventions of librosa.

transformers' `audio_utils` and scipy's Savitzky-Golay filter do the work; librosa is not needed.
"""

import warnings

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function


#: channels of the image: the spectrogram, and its first and second derivative in time
NUM_CHANNELS = 3


def mel_power(
    waveform: np.ndarray,
    sampling_rate: int,
    num_mel_filters: int = 224,
    n_fft: int = 2048,
    hop_length: int = 512,
    window: str = "hann",
    center: bool = True,
    pad_mode: str = "constant",
    power: float = 2.0,
    min_frequency: float = 0.0,
    max_frequency: float | None = None,
    mel_scale: str = "slaney",
    norm: str | None = "slaney",
) -> np.ndarray:
    """Mel spectrogram.

    Args:
        waveform: `(samples,)`.
        sampling_rate: in Hz.
        num_mel_filters: Mel bands.
        n_fft: samples of a frame.
        hop_length: samples from one frame to the next.
        window: name of the window, as `window_function` of transformers knows it.
        center: whether frames are centred, with padding at both ends.
        pad_mode: how to pad.
        power: 2 for power, 1 for magnitude.
        min_frequency: lowest frequency in Hz.
        max_frequency: highest frequency in Hz; half of the sampling rate if not given.
        mel_scale: `"slaney"`, `"htk"` or `"kaldi"`.
        norm: `"slaney"` for filters of equal area, or `None`.

    Returns:
        `(num_mel_filters, frames)` in float64.
    """
    with warnings.catch_warnings():
        # With many bands the lowest of them lie between two frequencies of the transform and stay empty, as in librosa.
        warnings.filterwarnings("ignore", message=".*mel filter has all zero values")
        filters = mel_filter_bank(
            1 + n_fft // 2,
            num_mel_filters,
            min_frequency,
            max_frequency if max_frequency is not None else sampling_rate / 2,
            sampling_rate,
            norm=norm,
            mel_scale=mel_scale,
        )
    return spectrogram(
        np.asarray(waveform, dtype=np.float64),
        window_function(n_fft, window),
        frame_length=n_fft,
        hop_length=hop_length,
        power=power,
        center=center,
        pad_mode=pad_mode,
        mel_filters=filters,
        mel_floor=0.0,
        dtype=np.float64,
    )


def decibels(power: np.ndarray, minimum: float = 1e-10, dynamic_range: float | None = 80.0) -> np.ndarray:
    """`10 log10(S / max S)`, with `S` at least `minimum`, floored at `dynamic_range` below its maximum."""
    levels = 10 * (np.log10(np.maximum(power, minimum)) - np.log10(max(power.max(), minimum)))
    return levels if dynamic_range is None else np.maximum(levels, levels.max() - dynamic_range)


def deltas(levels: np.ndarray, width: int = 9, mode: str = "interp") -> np.ndarray:
    """The levels with their first and second derivative in time, `(3, bands, frames)`.

    Args:
        levels: `(bands, frames)`.
        width: odd number of frames that a parabola is fitted to.
        mode: treatment of the boundaries, see `scipy.signal.savgol_filter`.

    Raises:
        ValueError: for fewer frames than `width` in mode `"interp"`.
    """
    from scipy.signal import savgol_filter

    if mode == "interp" and levels.shape[-1] < width:
        raise ValueError(
            f"The recording is too short: it has {levels.shape[-1]} frames, but a derivative over time needs {width}."
        )
    derivatives = [savgol_filter(levels, width, polyorder=k, deriv=k, mode=mode, axis=-1) for k in (1, 2)]
    return np.stack([levels, *derivatives])
