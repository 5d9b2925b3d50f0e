"""PSNR and SSIM as super-resolution papers measure them: on 8-bit images, without their border, on the Y channel."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch


#: BT.601 luma of RGB in [0, 1], on the scale 16...235
_LUMA = (65.481, 128.553, 24.966)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as 8-bit images: clamped, times 255, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def rgb_to_y(images: torch.Tensor) -> torch.Tensor:
    """Luma of 8-bit RGB images: `(..., 3, height, width)` -> `(..., 1, height, width)` in float64, 16 to 235, not rounded."""
    weight = torch.tensor(_LUMA, dtype=torch.float64, device=images.device).view(3, 1, 1)
    return 16 + (images.double() / 255 * weight).sum(-3, keepdim=True)


def psnr(
    prediction: torch.Tensor, reference: torch.Tensor, crop_border: int = 0, channel: Literal["y", "rgb"] = "y"
) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal images.

    Args:
        prediction, reference: 8-bit images, `(channels, height, width)`.
        crop_border: how many pixels to leave out on every side; papers take the scale.
        channel: `"y"` measures the luma of RGB images, `"rgb"` all channels.

    Raises:
        ValueError: if the images differ in shape, are not of 8 bits, or vanish with their border.
    """
    prediction, reference = _prepared(prediction, reference, crop_border, channel)
    error = (prediction - reference).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(255**2 / error))


def ssim(
    prediction: torch.Tensor, reference: torch.Tensor, crop_border: int = 0, channel: Literal["y", "rgb"] = "y"
) -> float:
    """Structural similarity: 11x11 Gaussian windows (sigma 1.5) inside the image, mean over pixels and channels.

    Arguments and errors as for [`psnr`]; the images must have at least 11x11 pixels without their border.
    """
    prediction, reference = _prepared(prediction, reference, crop_border, channel)
    if min(prediction.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM needs at least 11x11 pixels, but only {tuple(prediction.shape[-2:])} are left without the border "
            f"of {crop_border}."
        )
    position = torch.arange(11, dtype=torch.float64, device=prediction.device) - 5
    kernel = torch.exp(-(position**2) / (2 * 1.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2

    def smooth(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images[:, None], kernel[None, None])

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_p, mean_r = smooth(prediction), smooth(reference)
    variance_p = smooth(prediction**2) - mean_p**2
    variance_r = smooth(reference**2) - mean_r**2
    covariance = smooth(prediction * reference) - mean_p * mean_r
    similarity = (2 * mean_p * mean_r + c1) * (2 * covariance + c2)
    similarity /= (mean_p**2 + mean_r**2 + c1) * (variance_p + variance_r + c2)
    return float(similarity.mean())


def _prepared(prediction, reference, crop_border, channel) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, reference = torch.as_tensor(prediction), torch.as_tensor(reference)
    if prediction.shape != reference.shape:
        raise ValueError(f"The images differ in shape: {tuple(prediction.shape)} and {tuple(reference.shape)}.")
    for image in (prediction, reference):
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise ValueError(
                f"The metrics need 8-bit images of shape (channels, height, width), got {image.dtype} of shape "
                f"{tuple(image.shape)}; `to_uint8` converts images in [0, 1] to 8 bits."
            )
    if channel not in ("y", "rgb"):
        raise ValueError(f"channel must be 'y' or 'rgb', got {channel!r}.")
    height, width = prediction.shape[-2:]
    if crop_border < 0 or 2 * crop_border >= min(height, width):
        raise ValueError(f"Nothing is left of images of {height}x{width} without a border of {crop_border}.")
    inside = (..., slice(crop_border, height - crop_border), slice(crop_border, width - crop_border))
    prediction, reference = prediction[inside], reference[inside]
    if channel == "y" and prediction.shape[0] == 3:
        return rgb_to_y(prediction), rgb_to_y(reference)
    return prediction.double(), reference.double()


class RestorationMetrics:
    """PSNR and SSIM over a dataset, the mean over its images, with the interface of an `evaluate` module.

        metrics = RestorationMetrics(crop_border=4)
        metrics.compute(predictions=restored, references=originals)     # {"psnr": ..., "ssim": ...}
        Trainer(..., compute_metrics=metrics)                           # also with batch_eval_metrics=True

    Args:
        crop_border: as in [`psnr`]; papers take the scale.
        channel: as in [`psnr`].
    """

    name = "restoration"
    score_names = ("psnr", "ssim")

    def __init__(self, crop_border: int, channel: Literal["y", "rgb"] = "y"):
        self.crop_border = crop_border
        self.channel = channel
        self._scores: list[tuple[float, float]] = []

    def scores(self, prediction, reference) -> tuple[float, float]:
        """PSNR and SSIM of one image, `(channels, height, width)`: in [0, 1] if it is floating, else of 8 bits."""
        prediction, reference = (
            to_uint8(image) if image.is_floating_point() else image
            for image in (torch.as_tensor(prediction), torch.as_tensor(reference))
        )
        return (
            psnr(prediction, reference, self.crop_border, self.channel),
            ssim(prediction, reference, self.crop_border, self.channel),
        )

    def add(self, prediction, reference) -> None:
        """Measure one image, see [`scores`]."""
        self._scores.append(self.scores(prediction, reference))

    def add_batch(self, predictions: Sequence, references: Sequence) -> None:
        """Measure images, which may differ in size."""
        if len(predictions) != len(references):
            raise ValueError(f"Got {len(predictions)} predictions but {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction, reference)

    def compute(self, predictions: Sequence | None = None, references: Sequence | None = None) -> dict[str, float]:
        """The mean over the images given and those added before, and a new start."""
        if predictions is not None:
            self.add_batch(predictions, references)
        if not self._scores:
            raise ValueError("There are no images to measure.")
        scores, self._scores = self._scores, []
        return dict(zip(self.score_names, np.mean(scores, axis=0).tolist(), strict=True))

    def __call__(self, evaluation: Any, compute_result: bool = True) -> dict[str, float]:
        """`compute_metrics` of `Trainer`: a `transformers.EvalPrediction` of reconstructions and labels."""
        predictions = evaluation.predictions
        if isinstance(predictions, Mapping):
            predictions = predictions["reconstruction"]
        elif isinstance(predictions, tuple):
            predictions = predictions[0]
        self.add_batch(predictions, evaluation.label_ids)
        return self.compute() if compute_result else {}
