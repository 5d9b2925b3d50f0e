"""The autoencoder of attention patterns."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_attn import VitPatternAutoencoder, VitPatternAutoencoderConfig


def maps(heads=24, patches=12, seed=0):
    """In half of the heads every patch attends to itself, in the others to two fixed patches."""
    noise = torch.randn(heads, patches, patches, generator=torch.Generator().manual_seed(seed))
    noise[::2] += 4 * torch.eye(patches)
    noise[1::2, :, :2] += 4
    return noise.softmax(-1)


@pytest.mark.parametrize("patches, sizes", [(12, [4, 6]), (15, [4, 6]), (49, [4, 6, 8]), (4, [3])])
def test_maps_of_odd_sizes_are_restored(patches, sizes):
    model = VitPatternAutoencoder(VitPatternAutoencoderConfig(num_patches=patches, hidden_sizes=sizes)).eval()
    output = model(maps(3, patches))
    assert output.reconstruction.shape == (3, patches, patches)
    assert output.latents.shape == (3, 16)


def test_it_learns_the_two_kinds_and_keeps_them_when_saved(tmp_path):
    torch.manual_seed(0)
    model = VitPatternAutoencoder(VitPatternAutoencoderConfig.from_variant("tiny")).eval()
    losses = model.fit(maps(), epochs=60, learning_rate=1e-2)
    assert losses[-1] < 0.6 * losses[0]
    latents = model.encode(maps())
    spread = torch.cdist(latents[::2], latents[::2]).mean()
    assert torch.cdist(latents[::2], latents[1::2]).mean() > 2 * spread

    model.save_pretrained(tmp_path)
    loaded = VitPatternAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.map_std == model.config.map_std != 1
    assert torch.equal(loaded.encode(maps()), latents)


def test_fitting_is_reproducible():
    latents = []
    for _ in range(2):
        torch.manual_seed(3)
        model = VitPatternAutoencoder(VitPatternAutoencoderConfig.from_variant("tiny"))
        model.fit(maps(), epochs=2)
        latents.append(model.encode(maps()))
    assert torch.equal(*latents)


def test_bad_input_is_refused():
    model = VitPatternAutoencoder(VitPatternAutoencoderConfig.from_variant("tiny"))
    with pytest.raises(ValueError, match=r"of shape \(heads, 12, 12\).*\(3, 13, 13\)"):
        model(maps(3, 13))
    with pytest.raises(ValueError, match="at least 2 heads, got 1"):
        model.fit(maps(1))
    with pytest.raises(ValueError, match="All maps are equal"):
        model.fit(torch.full((3, 12, 12), 1 / 12))
    with pytest.raises(StrictDataclassClassValidationError, match="cannot be halved 3 times"):
        VitPatternAutoencoderConfig(num_patches=4)
