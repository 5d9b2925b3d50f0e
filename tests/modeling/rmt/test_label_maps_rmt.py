"""Label maps are cut as the images are, in all forms, and other shapes are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_attn.modeling.rmt.configuration_rmt import RMTConfig
from hf_attn.modeling.rmt.label_maps import TokenTargets, label_targets, read_label_map
from hf_attn.modeling.rmt.modeling_rmt import RMTForImageClassification
from hf_attn.modeling.rmt.token_labeling import mixed_token_labeling


@pytest.mark.parametrize("kind", ["shift", "photo"])
def test_the_map_is_cut_as_the_image_is(kind):
    """Cells of the map are as bright in the image as the number of their class: so are positions, of their targets."""
    pytest.importorskip("torchvision")
    from torchvision.transforms import v2

    from hf_attn.training.augmentation import Augmentation

    classes = torch.randint(8, (6, 9), generator=torch.Generator().manual_seed(0))
    # Beyond the border a shifted image is black; the map goes on as at its border.
    classes[[0, -1]] = classes[:, [0, -1]] = 0
    image = Image.fromarray((classes * 30).byte().repeat_interleave(20, 0).repeat_interleave(20, 1).numpy())
    augmentation = Augmentation(kind, (64, 96), [0.0], [1.0])
    augmentation.finish = v2.Compose(
        augmentation.finish.transforms[-3:]
    )  # without RandAugment, which changes brightness
    torch.manual_seed(0)
    mirrored = set()
    for _ in range(8):
        pixel_values, view = augmentation(image)
        targets = label_targets(classes, 8, (2, 3), view[:4], view.mirrored)
        mirrored.add(view.mirrored)
        expected = (targets * torch.arange(8)[:, None] * 30 / 255).sum(0)
        found = torch.cat([pixel_values.mean()[None], torch.nn.functional.avg_pool2d(pixel_values, 32).flatten()])
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert mirrored == ({False} if kind == "shift" else {False, True})


def test_the_forms_of_a_map_agree():
    classes = torch.tensor([[0, 1, 1], [2, 2, 0]])
    dense = torch.nn.functional.one_hot(classes, 4).permute(2, 0, 1)
    others = (classes + 1) % 4
    best = torch.stack([torch.tensor([[[3.0]], [[0.0]]]).expand(2, 2, 3), torch.stack([classes, others]).float()])
    targets = [label_targets(form, 4, (2, 2), (0, 0.5, 1, 1)) for form in (classes, dense * 5.0, best)]
    # The right half: half of the middle column, and the right one.
    third = 1 / 3
    for form in targets:
        assert torch.allclose(form.sum(0), torch.ones(5))
        torch.testing.assert_close(form, targets[0])
    torch.testing.assert_close(targets[0][:, 0], torch.tensor([third, 0.5, 0.5 - third, 0]))
    torch.testing.assert_close(
        targets[0][:, 1:], torch.tensor([[0, 0, third, 1], [1, 1, 0, 0], [0, 0, 2 * third, 0], [0.0] * 4])
    )
    mirrored = label_targets(classes, 4, (2, 2), (0, 0.5, 1, 1), mirrored=True)
    torch.testing.assert_close(mirrored[:, 1:], targets[0][:, [2, 1, 4, 3]])


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (
            torch.ones(3, 2, 2),
            r"label map has the shape \(3, 2, 2\); it must be \(height, width\), \(4, height, width\)",
        ),
        (torch.ones(3, 2, 2, 2), r"has the shape \(3, 2, 2, 2\)"),
        (torch.ones(0, 2), r"has the shape \(0, 2\)"),
        (torch.full((2, 2), 4), "classes from 4 to 4; they must be integers between 0 and 3"),
        (torch.full((4, 2, 2), -1.0), "apply a softmax first"),
        (torch.zeros(4, 2, 2), "at least one of them positive in each cell"),
        (torch.full((4, 2, 2), torch.nan), "non-negative numbers"),
    ],
)
def test_what_is_no_map_is_refused(label_map, message):
    with pytest.raises(ValueError, match=message):
        label_targets(label_map, 4, (1, 1))


def test_files_beside_images(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(2))
    torch.save(torch.eye(3), tmp_path / "b.pt")
    (tmp_path / "c.npy").write_bytes(b"nothing")
    assert read_label_map(tmp_path / "a.jpg").shape == (2, 2) and read_label_map(tmp_path / "b.jpg").shape == (3, 3)
    with pytest.raises(ValueError, match=r"c\.npy is not an array of numbers"):
        read_label_map(tmp_path / "c.png")


def test_a_step_with_maps():
    model = RMTForImageClassification(RMTConfig.from_variant("tiny", token_labeling=True, num_labels=3)).train()
    with pytest.raises(ValueError, match="in a column `label_map`"):
        TokenTargets(model)(None, None)
    targets = torch.stack([TokenTargets(model)([[number] * 2], None) for number in (0, 2)])
    pixel_values = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    losses = []
    for with_ground_truth in (False, True):
        torch.manual_seed(0)
        loss, _ = mixed_token_labeling(
            model, model, pixel_values, torch.tensor([1, 1]), targets, with_ground_truth=with_ground_truth
        )
        losses.append(loss.item())
    assert losses[0] != losses[1] and np.isfinite(losses).all()
