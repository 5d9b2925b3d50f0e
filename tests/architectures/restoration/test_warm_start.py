"""Initialisation as interpolation."""

import pytest
import torch

from hf_attn.architectures.restoration.warm_start import start_as_interpolation
from hf_attn.modeling.drct.configuration_drct import DRCTConfig
from hf_attn.modeling.drct.modeling_drct import DRCTForImageSuperResolution
from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATForImageSuperResolution


SHELL = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}


def make_model(family: str, **fields):
    torch.manual_seed(0)
    if family == "drct":
        return DRCTForImageSuperResolution(DRCTConfig(**{**SHELL, "growth_channels": 4, **fields})).eval()
    return HATForImageSuperResolution(
        HATConfig(**{**SHELL, "compress_ratio": 2, "squeeze_factor": 2, **fields})
    ).eval()


@pytest.mark.parametrize("family", ["hat", "drct"])
@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_quadratic_image_is_enlarged_exactly(family, upscale, num_channels):
    model = make_model(family, upscale=upscale, num_channels=num_channels)
    start_as_interpolation(model)

    def image(scale: int) -> torch.Tensor:
        """Samples of a quadratic function at the centres of pixels, `scale` times as many a side."""
        rows, columns = ((torch.arange(side * scale) + 0.5) / scale - 0.5 for side in (8, 12))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        quadratic = 0.3 + 0.01 * y - 0.02 * x + 0.001 * x**2 + 0.002 * x * y - 0.001 * y**2
        return torch.stack([quadratic + 0.1 * channel for channel in range(num_channels)])[None]

    with torch.no_grad():
        reconstruction = model(image(1)).reconstruction
    inside = (..., slice(3 * upscale, -3 * upscale), slice(3 * upscale, -3 * upscale))
    torch.testing.assert_close(reconstruction[inside], image(upscale)[inside], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["hat", "drct"])
def test_all_of_the_network_learns_from_the_second_step(family):
    model = make_model(family, upscale=2).train()
    start_as_interpolation(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    for _ in range(3):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
    # A bias that is removed by the next normalisation or the softmax has no gradient.
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_fewer_features_than_channels():
    with pytest.raises(ValueError, match=r"embed_dim \(2\) must be at least the number of channels, 3"):
        start_as_interpolation(make_model("hat", embed_dim=2))
