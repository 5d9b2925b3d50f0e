"""Degradations of the real-world recipe: kernels by definition, ranges, and the same result for the same seed."""

import math

import numpy as np
import pytest
import torch
from scipy.special import j1

from hf_attn.restoration.degradation import (
    FIRST,
    SECOND,
    add_noise,
    compress,
    degrade,
    filter_image,
    gaussian_kernel,
    random_kernel,
    sharpen,
    sinc_kernel,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(*size: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 5, 6, generator=seeded())
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 1)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_low_resolution_of_the_right_size_and_depth_by_seed(scale, channels):
    image = photo(48, 64)[:channels]
    results = [degrade(image, scale, seeded(seed)) for seed in (*range(12), 3)]
    for result in results:
        assert result.shape == (channels, 48 // scale, 64 // scale)
        assert result.min() >= 0 and result.max() <= 1
        torch.testing.assert_close(result * 255, (result * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(results[3], results[-1])
    assert len({result.numpy().tobytes() for result in results}) == 12
    # The result is closer to its own downscaled image than to another one.
    small = torch.nn.functional.interpolate(image[None], size=results[0].shape[1:], mode="area")[0]
    errors = [(result - small).abs().mean() for result in results]
    mirrored = [(result - small.flip(-1)).abs().mean() for result in results]
    assert sum(errors) < sum(mirrored)


def test_the_global_generator_is_the_default():
    torch.manual_seed(5)
    first = degrade(photo(32, 32), 4)
    torch.manual_seed(5)
    assert torch.equal(degrade(photo(32, 32), 4), first)


def test_tiny_images_survive_every_branch():
    for seed in range(30):
        assert degrade(photo(8, 8), 8, seeded(seed)).shape == (3, 1, 1)


@pytest.mark.parametrize("size", [(0, 8), (10, 8)])
def test_sides_that_do_not_divide(size):
    with pytest.raises(ValueError, match=rf"must be positive multiples of 4, got {size[0]}x8"):
        degrade(torch.rand(3, *size), 4)


def test_gaussian_kernels_are_what_they_are_defined_as():
    kernel = gaussian_kernel(9, (1.0, 2.5), angle=0.7, power=1.3)
    plateau = gaussian_kernel(9, (1.0, 2.5), angle=0.7, power=1.3, plateau=True)
    turn = np.array([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    inverse = np.linalg.inv(turn @ np.diag([1.0, 2.5**2]) @ turn.T)
    expected, expected_plateau = np.zeros((9, 9)), np.zeros((9, 9))
    for row in range(9):
        for column in range(9):
            offset = np.array([column - 4, row - 4])
            distance = (offset @ inverse @ offset) ** 1.3
            expected[row, column] = math.exp(-distance / 2)
            expected_plateau[row, column] = 1 / (1 + distance)
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-6)
    np.testing.assert_allclose(plateau, expected_plateau / expected_plateau.sum(), atol=1e-6)


def test_sinc_kernel_is_the_transform_of_a_disc():
    cutoff, side = 2.0, 21
    kernel = sinc_kernel(side, cutoff).double()
    position = np.arange(side) - side // 2
    radius = np.hypot(*np.meshgrid(position, position))
    expected = np.where(radius == 0, cutoff**2 / (4 * math.pi), 0.0)
    expected[radius > 0] = cutoff * j1(cutoff * radius[radius > 0]) / (2 * math.pi * radius[radius > 0])
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-6)
    assert kernel.min() < 0


@pytest.mark.parametrize("sigma", [FIRST.sigma, SECOND.sigma])
def test_random_kernels_keep_brightness(sigma):
    kernels = [random_kernel(sigma, seeded(seed)) for seed in range(60)]
    assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))
    for kernel in kernels:
        assert kernel.shape == (len(kernel), len(kernel))
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    ringing = sum(bool(kernel.min() < 0) for kernel in kernels)
    assert 0 < ringing < 20
    constant = filter_image(torch.full((3, 5, 4), 0.3), kernels[0])
    torch.testing.assert_close(constant, torch.full((3, 5, 4), 0.3), atol=1e-5, rtol=0)


def test_noise_is_as_strong_as_asked_for():
    # 128 values and so as many photons: Poisson noise of 16/255 before its factor.
    image = torch.linspace(0.25, 0.75, 128).expand(3, 128, 128)
    deviations, same = [], []
    for seed in range(60):
        noise = add_noise(image, FIRST, seeded(seed)) - image
        deviations.append(float(noise.std()) * 255)
        same.append(torch.allclose(noise[0], noise[1], atol=1e-6))
        assert abs(float(noise.mean())) < 0.01
    assert min(deviations) < 5
    assert 30 < max(deviations) < 3 * 17
    assert 10 < sum(same) < 40


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_keeps_the_image_as_well_as_its_quality_says(quality):
    image = photo(40, 56)
    error = (compress(image, quality) - image).abs().mean() * 255
    assert 0.1 < error < {30: 8, 95: 2}[quality]
    grey = compress(image[:1], quality)
    assert grey.shape == (1, 40, 56)
    assert (grey - image[:1]).abs().mean() * 255 < 3


def test_sharpening_leaves_flat_images_alone_and_steepens_edges():
    flat = torch.full((3, 20, 20), 0.4)
    torch.testing.assert_close(sharpen(flat), flat)
    edge = torch.full((3, 60, 60), 0.3)
    edge[..., 30:] = 0.7
    sharp = sharpen(edge)
    assert 0.3 - sharp[0, 30, 29] > 0.05
    assert sharp[0, 30, 30] - 0.7 > 0.05
    assert sharp.min() >= 0 and sharp.max() <= 1
