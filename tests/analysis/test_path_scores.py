"""Scores of the paths of a path ensemble."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_attn.analysis import PathScores, path_scores
from tests.batteries.imaging import randomize
from tests.modeling.path_ensemble.test_path_ensemble import tiny_model


@pytest.fixture
def model():
    return tiny_model(ensemble_scale="channel", pruned_paths=[1])


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 16, 16, generator=generator)
    return [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(images)]


def accuracy(logits: torch.Tensor) -> float:
    return (logits.argmax(-1) == torch.arange(10) % 4).float().mean().item()


def test_scores_are_accuracies(model, dataset):
    model.train()
    scores = path_scores(model, dataset, batch_size=3, progress=False)
    assert model.training and scores.num_samples == 10
    model.eval()
    pixel_values = torch.stack([sample["pixel_values"] for sample in dataset])
    with torch.no_grad():
        paths = model.vit(pixel_values, output_paths=True).paths
        assert scores.ensemble == pytest.approx(accuracy(model(pixel_values).logits))
        for index, path in enumerate(paths):
            assert scores.alone[index].item() == pytest.approx(accuracy(model.classify(path)))
            model.prune(sorted({1, index}))
            assert scores.without[index].item() == pytest.approx(accuracy(model(pixel_values).logits))
            model.prune([1])
    assert scores.gain[1] == 0
    assert scores.names == ("embeddings", "layer 1", "layer 2", "layer 3")


def test_the_worst_path_is_first_in_the_ranking():
    scores = PathScores(
        names=("embeddings", "layer 1", "layer 2"),
        ensemble=0.75,
        alone=torch.tensor([0.1, 0.25, 0.5]),
        without=torch.tensor([0.75, 0.875, 0.25]),
        num_samples=8,
    )
    assert scores.ranking == [1, 0, 2]
    table = str(scores).splitlines()
    assert table[0] == "Accuracy of the ensemble: 75.00% on 8 images"
    assert table[3].split() == ["layer", "1", "25.00%", "87.50%", "-12.50%"]


def test_plot(model, dataset, tmp_path):
    pytest.importorskip("matplotlib")
    path_scores(model, dataset, progress=False).plot(tmp_path / "paths.png")
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(model, dataset):
    with pytest.raises(ValueError, match="empty"):
        path_scores(model, [], progress=False)
    with pytest.raises(ValueError, match="Sample 0 has no labels, only pixel_values"):
        path_scores(model, [{"pixel_values": torch.zeros(3, 16, 16)}], progress=False)
    base = randomize(
        ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16))
    )
    with pytest.raises(ValueError, match=r"has no paths.*from_base"):
        path_scores(base, dataset, progress=False)


def test_ignored_labels_are_left_out(model, dataset):
    every = path_scores(model, dataset[:6], progress=False)
    mixed = [{**sample, "labels": -100} for sample in dataset[6:]] + dataset[:6]
    some = path_scores(model, mixed, batch_size=4, progress=False)
    assert some.num_samples == 6
    assert some.ensemble == every.ensemble
    assert torch.equal(some.alone, every.alone)
    with pytest.raises(ValueError, match="all its labels are -100"):
        path_scores(model, mixed[:4], progress=False)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (4, "Label 4 is out of range: the model has classes 0 to 3"),
        (-1, "is out of range"),
        (1.5, r"must be the integer index of one class; got torch\.float32"),
        ([0, 1], "the integer index of one class"),
    ],
)
def test_labels_that_are_no_class_are_refused(model, dataset, label, message):
    with pytest.raises(ValueError, match=message):
        path_scores(model, [{**sample, "labels": label} for sample in dataset[:2]], progress=False)


def test_a_sample_without_labels_is_named_and_other_columns_do_not_matter(model, dataset):
    path_scores(model, [{**dataset[0], "file": "a.png"}], progress=False)
    with pytest.raises(ValueError, match="Sample 1 has no labels, only pixel_values"):
        path_scores(model, [dataset[0], {"pixel_values": dataset[1]["pixel_values"]}], progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        path_scores(model, dataset, batch_size=0, progress=False)
