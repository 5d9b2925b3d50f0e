"""Properties of the metrics and hop profiles that hold for every model."""

import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from hf_attn.analysis.vit import (
    Grid,
    attention_strength,
    cluster_heads,
    offset_map,
    patch_entropy,
    pattern_of,
    prediction_change,
    representation_change,
    ring_mass,
)
from hf_attn.analysis.vit.patterns import FEATURES

from .synthetic import GRID, KINDS, synthetic_heads


OBLONG = Grid(3, 5, num_prefix_tokens=2)


def test_pairs_at_each_hop_of_vit_base():
    pairs = [196, 1404, 2496, 3300, 3840, 4140, 4224, 4116, 3840, 3420, 2880, 2244, 1536, 780]
    assert Grid(14, 14).ring_sizes().sum(0).tolist() == pairs


def test_all_attention_is_accounted_for():
    maps = torch.randn(4, 17, 17).double().softmax(-1)
    strength = attention_strength(maps, OBLONG)
    torch.testing.assert_close(strength.ring_mass.sum(-1) + strength.to_cls, torch.ones(4).double())
    weighted = (offset_map(maps, OBLONG) * OBLONG.offset_counts()).sum((-2, -1))
    torch.testing.assert_close(weighted, 15 * (1 - strength.to_cls))


def test_uniform_and_identity_attention():
    uniform = torch.full((17, 17), 1 / 17)
    strength = attention_strength(uniform, OBLONG)
    torch.testing.assert_close(strength.ring_mean, torch.full((5,), 1 / 17))
    torch.testing.assert_close(strength.ring_pooled_mean, torch.full((5,), 1 / 17))
    assert patch_entropy(uniform, OBLONG).item() == pytest.approx(math.log(15))
    identity = torch.eye(17)
    strength = attention_strength(identity, OBLONG)
    assert strength.ring_mass.tolist() == [1, 0, 0, 0, 0] and strength.mean_hop == 0
    assert patch_entropy(identity, OBLONG) == 0
    offsets = offset_map(identity, OBLONG)
    assert offsets[2, 4] == 1 and offsets.sum() == 1


def test_an_offset_has_its_direction():
    below = torch.zeros(12, 12)
    grid = Grid(3, 4, num_prefix_tokens=0)
    for patch in range(8):
        below[patch, patch + 4] = 1
    assert offset_map(below, grid)[3, 3] == 1
    assert ring_mass(below, grid)[0].tolist() == [0, 1, 0, 0]


def test_no_change_is_zero_and_divergences_have_their_limits():
    logits, other = torch.randn(2, 5, 4)
    labels = torch.arange(5) % 4
    assert all(values.abs().max() < 1e-15 for values in prediction_change(logits, logits, labels).values())
    forth, back = prediction_change(logits, other)["jsd"], prediction_change(other, logits)["jsd"]
    torch.testing.assert_close(forth, back)
    sure = torch.tensor([[100.0, 0.0]])
    assert prediction_change(sure, sure.flip(-1))["jsd"].item() == pytest.approx(math.log(2))
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert prediction_change(impossible, impossible)["kl"].item() == 0
    states = torch.randn(5, 6)
    assert representation_change(states, 3 * states)["cls_cosine"].abs().max() < 1e-12


def test_metrics_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="Label 4 is out of range: the model has 4 classes"):
        prediction_change(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"\(images, classes\).*\(2, 4\) and \(3, 4\)"):
        prediction_change(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one class index for each of the 2 images"):
        prediction_change(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"2 prefix tokens and 3 x 5 patches are 17 x 17, got \(16, 16\)"):
        offset_map(torch.zeros(16, 16), OBLONG)


@pytest.mark.parametrize("features", FEATURES)
def test_heads_of_known_kinds_are_grouped(features):
    clusters = cluster_heads(synthetic_heads(), GRID, 6, features)
    truth = [kind for kind in KINDS for _ in range(12)]
    assert adjusted_rand_score(truth, clusters.labels) >= 0.7
    assert clusters.positions.shape == (72, 2)


def test_patterns_have_their_names():
    maps = synthetic_heads(per_kind=3, seed=1)
    assert [pattern_of(head, GRID) for head in maps] == [kind for kind in KINDS for _ in range(3)]
    turned = maps[6].view(7, 7, 7, 7).permute(1, 0, 3, 2).reshape(49, 49)
    assert pattern_of(turned, GRID) == "column"


def test_clusters_refuse_what_does_not_fit():
    maps = synthetic_heads(per_kind=1)
    for arguments, message in (
        ({"num_clusters": 6}, "num_clusters must be between 2 and 5 for 6 heads, got 6"),
        ({"features": "colours"}, "no features called 'colours'"),
        ({"features": torch.zeros(5, 2).numpy()}, r"Features must have the shape \(6, features\).*\(5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster_heads(maps, GRID, **arguments)
    with pytest.raises(ValueError, match="at least 3 heads, got 2"):
        cluster_heads(maps[:2], GRID)
