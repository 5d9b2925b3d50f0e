"""Losses and discriminator of the real-world recipe, against computations by hand."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import vgg19

from hf_attn.restoration.adversarial import PerceptualLoss, UNetDiscriminator, discriminator_loss, generator_loss


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return vgg19().eval()


def test_discriminator_has_one_output_per_pixel():
    discriminator = UNetDiscriminator(num_features=4)
    assert discriminator(torch.rand(2, 3, 16, 24)).shape == (2, 1, 16, 24)
    with pytest.raises(ValueError, match=r"multiples of 8, got \(12, 16\)"):
        discriminator(torch.rand(1, 3, 12, 16))


def test_discriminator_of_the_published_width():
    def convolution(inputs, outputs, side, bias=False):
        return inputs * outputs * side**2 + (outputs if bias else 0)

    with torch.device("meta"):
        discriminator = UNetDiscriminator()
    expected = convolution(3, 64, 3, True) + convolution(64, 1, 3, True) + 2 * convolution(64, 64, 3)
    expected += sum(convolution(64 * 2**i, 128 * 2**i, 4) + convolution(128 * 2**i, 64 * 2**i, 3) for i in range(3))
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == expected


def test_convolutions_of_the_discriminator_have_spectral_norm_one():
    torch.manual_seed(0)
    discriminator = UNetDiscriminator(num_features=4)
    for _ in range(60):
        discriminator(torch.rand(1, 3, 8, 8))
    inner = [*discriminator.down, *discriminator.up, *discriminator.refine]
    assert len(inner) == 8
    for convolution in inner:
        assert float(torch.linalg.matrix_norm(convolution.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-2)
        assert convolution.bias is None


def test_skip_connections_add():
    """With the deeper levels set to zero, only the first convolution and the last ones remain."""
    torch.manual_seed(0)
    discriminator = UNetDiscriminator(num_features=4).eval()
    nn.utils.parametrize.remove_parametrizations(discriminator.up[-1], "weight")
    nn.init.zeros_(discriminator.up[-1].weight)
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        features = nn.functional.leaky_relu(discriminator.first(images), 0.2)
        for convolution in discriminator.refine:
            features = nn.functional.leaky_relu(convolution(features), 0.2)
        torch.testing.assert_close(discriminator(images), discriminator.last(features))


def test_adversarial_losses_by_hand():
    real, generated = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])

    def softplus(x):
        return math.log(1 + math.exp(x))

    assert float(generator_loss(generated)) == pytest.approx((softplus(-0.5) + softplus(0.0)) / 2)
    expected = (softplus(-1.0) + softplus(2.0)) / 2 + (softplus(0.5) + softplus(0.0)) / 2
    assert float(discriminator_loss(real, generated)) == pytest.approx(expected)


def test_perceptual_loss_by_hand(vgg):
    loss = PerceptualLoss(vgg.state_dict())
    images, targets = torch.rand(2, 3, 32, 16), torch.rand(2, 3, 32, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(batch):
        """Inputs of the ReLU after the second, fourth, eighth, twelfth and sixteenth convolution."""
        seen, batch, count = {}, (batch - mean.view(3, 1, 1)) / std.view(3, 1, 1), 0
        for layer in vgg.features[:-1]:
            batch = nn.functional.relu(batch) if isinstance(layer, nn.ReLU) else layer(batch)
            if isinstance(layer, nn.Conv2d):
                count += 1
                seen[count] = batch
        return seen

    with torch.no_grad():
        ours, theirs = features(images), features(targets)
        weights = {2: 0.1, 4: 0.1, 8: 1.0, 12: 1.0, 16: 1.0}
        expected = sum(weight * (ours[n] - theirs[n]).abs().mean() for n, weight in weights.items())
        torch.testing.assert_close(loss(images, targets), expected)
        assert loss(images, images) == 0


def test_perceptual_loss_reaches_the_image_and_not_the_network(vgg, tmp_path):
    torch.save(vgg.state_dict(), tmp_path / "vgg19.pth")
    loss = PerceptualLoss(tmp_path / "vgg19.pth")
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss.train()(images, torch.rand(1, 3, 16, 16)).backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_weights_of_something_else(tmp_path):
    with pytest.raises(
        ValueError, match=r"not weights of torchvision's vgg19: features\.0\.weight is missing\. Save `"
    ):
        PerceptualLoss({"conv.weight": torch.zeros(1)})
