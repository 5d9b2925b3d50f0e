"""Initial weights with which a model computes an interpolation, so that training starts from there."""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def start_as_interpolation(model: PreTrainedModel) -> None:
    """Set weights of a fresh HAT or DRCT so that its output is quadratic interpolation of the image (the image, at scale 1).

    The architecture has no path from the image to the output but the network itself. The image goes through channels of
    the long skip, and through LeakyReLU as a positive and a negative half; every other weight keeps its initial value, except
    those that would add to the output, which start at zero.

    Args:
        model: `HATForImageSuperResolution` or `DRCTForImageSuperResolution` with its initial weights; changed in place.

    Raises:
        ValueError: if the model has fewer channels than the image.
    """
    config, base, head = model.config, model.base_model, model.reconstruction
    image = range(config.num_channels)
    if config.embed_dim < len(image):
        raise ValueError(f"embed_dim ({config.embed_dim}) must be at least the number of channels, {len(image)}.")
    slope = head.activation.negative_slope

    for channel in image:
        _pick(base.first_convolution, channel, {channel: 1.0})
        if isinstance(base.conv_after_body, torch.nn.Conv2d):
            _pick(base.conv_after_body, channel, {})
        _pick(head.conv_before_upsample, 2 * channel, {channel: 1.0})
        _pick(head.conv_before_upsample, 2 * channel + 1, {channel: -1.0})
    # LeakyReLU(x) - LeakyReLU(-x) = (1 + slope) x
    sources = {channel: {2 * channel: 1 / (1 + slope), 2 * channel + 1: -1 / (1 + slope)} for channel in image}
    for convolution, shuffle in zip(head.convolutions, head.shuffles, strict=True):
        factor = shuffle.upscale_factor
        taps = _quadratic_taps(factor)
        for channel in image:
            for row in range(factor):
                for column in range(factor):
                    output = channel * factor**2 + row * factor + column
                    _pick(convolution, output, sources[channel], torch.outer(taps[row], taps[column]))
        sources = {channel: {channel: 1.0} for channel in image}
    for channel in image:
        _pick(head.final_convolution, channel, sources[channel])


def _pick(
    convolution: torch.nn.Conv2d, output: int, gains: dict[int, float], kernel: torch.Tensor | None = None
) -> None:
    """Make an output channel a sum of input channels, times their gains and filtered by a 3x3 kernel."""
    convolution.weight[output] = 0
    convolution.bias[output] = 0
    for channel, gain in gains.items():
        if kernel is None:
            convolution.weight[output, channel, 1, 1] = gain
        else:
            convolution.weight[output, channel] = gain * kernel


def _quadratic_taps(factor: int) -> torch.Tensor:
    """Weights `(factor, 3)` of three neighbours at each of the positions into which a pixel is divided."""
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    return torch.stack((offset * (offset - 1) / 2, 1 - offset**2, offset * (offset + 1) / 2), dim=1)
