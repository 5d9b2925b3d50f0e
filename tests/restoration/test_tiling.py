"""Tiles: the weights of every pixel sum to 1, and a tile that covers the image changes nothing."""

import pytest
import torch

from hf_attn.restoration.tiling import BLENDS, count_tiles, restore_bands, restore_image, self_ensemble, spans


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """A network of scale 2 with a receptive field of one pixel, so that tiles make no difference."""
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(1, 1), (13, 10), (16, 40), (33, 17)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 4), (16, 8), (24, 4), (64, 32)])
@pytest.mark.parametrize("padding", ["reflect", "symmetric"])
def test_tiles_of_a_local_network_make_the_whole(blend, size, tile, overlap, padding):
    image = torch.rand(1, 3, *size)
    seen = []
    restored = restore_image(
        enlarge,
        image,
        2,
        4,
        tile=tile,
        tile_overlap=overlap,
        blend=blend,
        padding=padding,
        batch_size=3,
        on_tile=seen.append,
    )
    torch.testing.assert_close(restored, enlarge(image))
    # Bands of padding alone are not restored.
    assert 0 < sum(seen) <= count_tiles(*size, 4, tile, overlap, blend, padding)


def test_bands_are_handed_out_from_top_to_bottom():
    image = torch.rand(1, 1, 30, 9)
    rows = 0
    for first_row, band in restore_bands(enlarge, image, 2, 4, tile=8, tile_overlap=4, blend="feather"):
        assert first_row == rows
        assert band.shape[0] == 1
        assert band.shape[2] == 18
        assert band.shape[1] <= 16
        rows += band.shape[1]
    assert rows == 60


def test_a_network_with_a_view_sees_the_surroundings():
    """With `cut`, tiles that are extended by the receptive field of the network give exactly the whole image."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 1, 5, padding=2)
    image = torch.rand(1, 1, 24, 32)
    with torch.no_grad():
        whole = convolution(image)
        torch.testing.assert_close(
            restore_image(convolution, image, 1, 4, tile=8, tile_overlap=4, blend="cut"), whole, atol=1e-6, rtol=1e-5
        )
        bare = restore_image(convolution, image, 1, 4, tile=8, tile_overlap=0, blend="cut")
        mean = restore_image(convolution, image, 1, 4, tile=8, tile_overlap=4, blend="mean")
        feather = restore_image(convolution, image, 1, 4, tile=8, tile_overlap=4, blend="feather")
    errors = [(result - whole).square().mean().item() for result in (bare, mean, feather)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_feather_falls_linearly_in_the_overlap_and_sums_to_one():
    left, right = spans(12, 8, 4, "feather")
    assert (left.start, left.stop, right.start, right.stop) == (0, 8, 4, 12)
    assert left.weight(1).tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    assert right.weight(1).tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]


def test_self_ensemble_averages_the_eight_symmetries():
    weight = torch.arange(9.0).view(1, 1, 3, 3)

    def convolve(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, weight, padding=1)

    image = torch.rand(1, 1, 5, 7)
    symmetries = [turned for k in range(4) for turned in (weight.rot90(k, (2, 3)), weight.rot90(k, (2, 3)).flip(3))]
    symmetric = torch.stack(symmetries).mean(0)
    torch.testing.assert_close(
        self_ensemble(convolve)(image), torch.nn.functional.conv2d(image, symmetric, padding=1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend": "smooth"}, "blend must be one of cut, mean, feather, got 'smooth'"),
        ({"tile": 10}, "tile must be a positive multiple of the model's window, 4; got 10. Try 8"),
        ({"tile": 0}, "got 0. Try 4"),
        ({"tile": 8, "tile_overlap": 3, "blend": "cut"}, "tile_overlap must be a multiple of the window, 4; got 3"),
        ({"tile": 8, "tile_overlap": 8, "blend": "mean"}, r"tile_overlap \(8\) must be smaller than tile \(8\)"),
        ({"tile": 8, "tile_overlap": -4}, "tile_overlap cannot be negative, got -4"),
        ({"padding": "zeros"}, "padding mode"),
    ],
)
def test_what_cannot_be_done(options, message):
    with pytest.raises(ValueError, match=message):
        restore_image(enlarge, torch.rand(1, 3, 20, 20), 2, 4, **options)


def test_network_of_another_scale():
    with pytest.raises(ValueError, match="does not match upscale=4"):
        restore_image(enlarge, torch.rand(1, 3, 8, 8), 4, 4)
