"""PSNR, SSIM and bicubic resizing, beyond the golden case."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from transformers import EvalPrediction

from hf_attn.restoration.metrics import RestorationMetrics, psnr, rgb_to_y, ssim, to_uint8
from hf_attn.restoration.resize import bicubic_downscale, bicubic_resize, crop_to_multiple


def noisy_pair(channels=3, size=(40, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(channels, *size, generator=generator)
    prediction = reference + 0.1 * torch.randn(channels, *size, generator=generator)
    return to_uint8(prediction), to_uint8(reference)


def test_psnr_of_a_known_error():
    reference = torch.full((1, 20, 20), 100, dtype=torch.uint8)
    assert psnr(reference + 5, reference) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(reference, reference) == float("inf")


def test_the_border_does_not_count():
    prediction, reference = noisy_pair()
    inside = psnr(prediction, reference, 4)
    prediction[:, :4] = 0
    prediction[:, :, -4:] = 255
    assert psnr(prediction, reference, 4) == inside
    assert psnr(prediction, reference, 0) < inside


def test_ssim_agrees_with_scikit_image():
    prediction, reference = noisy_pair()
    ours = ssim(prediction, reference, channel="rgb")
    _, map_of_similarity = structural_similarity(
        prediction.numpy(),
        reference.numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    assert ours == pytest.approx(map_of_similarity[:, 5:-5, 5:-5].mean(), abs=1e-6)


def test_luma_of_black_white_and_grey():
    image = torch.tensor([0, 255, 128], dtype=torch.uint8).expand(3, 1, 3)
    torch.testing.assert_close(
        rgb_to_y(image)[0, 0], torch.tensor([16, 235, 16 + 219 * 128 / 255], dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_metrics_as_an_evaluate_module_and_in_a_trainer():
    prediction, reference = noisy_pair()
    other_prediction, other_reference = noisy_pair(size=(25, 50))
    metrics = RestorationMetrics(crop_border=2)
    scores = metrics.compute(predictions=[prediction, other_prediction], references=[reference, other_reference])
    assert scores["psnr"] == pytest.approx(
        (psnr(prediction, reference, 2) + psnr(other_prediction, other_reference, 2)) / 2
    )
    assert scores["ssim"] == pytest.approx(
        (ssim(prediction, reference, 2) + ssim(other_prediction, other_reference, 2)) / 2
    )
    # In two batches of floating-point images, as passed by `Trainer` with `batch_eval_metrics`.
    batches = [
        EvalPrediction(predictions=a[None].numpy() / np.float32(255), label_ids=b[None].numpy() / np.float32(255))
        for a, b in ((prediction, reference), (other_prediction, other_reference))
    ]
    assert metrics(batches[0], compute_result=False) == {}
    assert metrics(batches[1], compute_result=True) == scores
    with pytest.raises(ValueError, match="no images"):
        metrics.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(3, 9, 8, dtype=torch.uint8)), "differ in shape"),
        ((torch.zeros(3, 9, 9), torch.zeros(3, 9, 9)), "8-bit images"),
        ((torch.zeros(3, 9, 9, dtype=torch.uint8),) * 2 + (5,), "Nothing is left of images of 9x9"),
        ((torch.zeros(3, 9, 9, dtype=torch.uint8),) * 2 + (0, "hsv"), "'y' or 'rgb', got 'hsv'"),
    ],
)
def test_images_that_cannot_be_measured(arguments, message):
    with pytest.raises(ValueError, match=message):
        psnr(*arguments)


def test_ssim_needs_a_window():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11x11 pixels"):
        ssim(image, image, crop_border=3)


def test_bicubic_keeps_constants_and_straight_lines():
    ramp = torch.arange(40, dtype=torch.float64).expand(8, 40) / 40
    for scale in (1 / 2, 1 / 4, 2, 3):
        resized = bicubic_resize(ramp, scale)
        centre = (torch.arange(resized.shape[1], dtype=torch.float64) + 0.5) / scale - 0.5
        inside = slice(resized.shape[1] // 4, -(resized.shape[1] // 4))
        torch.testing.assert_close(resized[0, inside], (centre / 40)[inside], atol=1e-9, rtol=0)
        torch.testing.assert_close(
            bicubic_resize(torch.ones(5, 7), scale), torch.ones_like(bicubic_resize(torch.ones(5, 7), scale))
        )


def test_downscaling_wants_multiples():
    with pytest.raises(ValueError, match="not multiples of 3"):
        bicubic_downscale(torch.rand(3, 10, 9), 3)
    assert bicubic_downscale(crop_to_multiple(torch.rand(3, 10, 9), 3), 3).shape == (3, 3, 3)
    with pytest.raises(ValueError, match="floating"):
        bicubic_resize(torch.zeros(3, 8, 8, dtype=torch.uint8), 0.5)
    with pytest.raises(ValueError, match="positive"):
        bicubic_resize(torch.rand(3, 8, 8), -1)
