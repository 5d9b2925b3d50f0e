"""Readers of eye-tracking data, the split by image, generated scenes and baselines."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_attn.modeling.oat.baselines import random_walk, saliency_walk
from hf_attn.modeling.oat.evaluation import evaluate_predictions
from hf_attn.modeling.oat.generated_scenes import SceneGenerator
from hf_attn.modeling.oat.processing_oat import OATImageProcessor, collate_scenes
from hf_attn.modeling.oat.readers import read_amazon, read_shelves, read_trials
from hf_attn.modeling.oat.trials import ScanpathDataset, Trial, split_by_image, without_outliers


def save_image(folder, name, size):
    Image.new("RGB", size, "white").save(folder / name)


@pytest.fixture
def amazon(tmp_path):
    save_image(tmp_path, "1.jpg", (280, 120))
    entry = {
        "fixations": {"1": [[5, 5], [25, 45]], "2": [[279, 119]], "3": []},
        "ground_truth": [{"xmin": 21, "xmax": 39, "ymin": 41, "ymax": 59}],
        "size": {"width": 280, "height": 120},
        "target": "target_0.jpg",
    }
    (tmp_path / "Amazon.json").write_text(json.dumps({"1.jpg": entry}))
    return tmp_path


def test_book_covers_in_a_plain_grid(amazon):
    trials = read_amazon(amazon / "Amazon.json", amazon)
    assert [trial.scanpath for trial in trials] == [[0, 29], [83]]
    assert trials[0].target_index == 29
    assert trials[0].fixations.tolist() == [[5, 5], [25, 45]]
    scene = ScanpathDataset(trials, OATImageProcessor(size={"height": 20, "width": 20}))[0]
    assert scene["pixel_values"].shape == (84, 3, 20, 20)
    assert scene["object_positions"][29].tolist() == [2, 1]


def test_book_covers_with_boxes(amazon):
    boxes = {"1.jpg": [[0, 0, 20, 20], [20, 40, 40, 60]]}
    (amazon / "boxes.json").write_text(json.dumps(boxes))
    trials = read_amazon(amazon / "Amazon.json", amazon, amazon / "boxes.json")
    assert [trial.scanpath for trial in trials] == [[0, 1], [1]]
    boxes["1.jpg"][0][0] = -5
    (amazon / "boxes.json").write_text(json.dumps(boxes))
    with pytest.raises(ValueError, match=r"1\.jpg: Box 0"):
        read_amazon(amazon / "Amazon.json", amazon, amazon / "boxes.json")


def test_incomplete_annotations(amazon):
    (amazon / "Amazon.json").write_text(json.dumps({"1.jpg": {"fixations": {}}}))
    with pytest.raises(ValueError, match=r"1\.jpg has no 'size'"):
        read_amazon(amazon / "Amazon.json", amazon)
    (amazon / "Amazon.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_amazon(amazon / "Amazon.json", amazon)


SHELF = """ID,Sub_ID,Target,Question,T_Package,Choice,X,Y
7,1,a,Q3_1,12,1,10,140
7,1,a,Q3_1,12,12,400,500
8,1,b,Q1_2,22,22,1600,1000
"""


def test_shelves(tmp_path):
    for name in ("Q3_1.png", "Q1_2.png"):
        save_image(tmp_path, name, (1680, 1050))
    (tmp_path / "table.csv").write_text(SHELF)
    yogurt, wine = read_shelves(tmp_path / "table.csv", tmp_path)
    assert (yogurt.scanpath, yogurt.target_index, yogurt.grid) == ([0, 11], 11, (3, 9))
    assert yogurt.boxes[0].tolist() == [0, 135, 186, 440]
    assert (wine.scanpath, wine.target_index, wine.grid) == ([21], 21, (2, 11))
    assert wine.boxes[0].tolist() == [0, 152, 152, 601]
    batch = collate_scenes(list(ScanpathDataset([yogurt, wine], OATImageProcessor(size={"height": 20, "width": 20}))))
    assert batch["pixel_values"].shape[:2] == (2, 27)
    assert batch["labels"].tolist() == [[0, 11, 27], [21, 27, -100]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Choice", "Chosen", "no column Choice"),
        ("Q1_2", "Q9_2", "unknown layout 'Q9_2'"),
        ("Q3_1,12,1,", "Q3_1,12,28,", "trial 7: Object 27 is out of range"),
        ("Q1_2", "Q1_5", "There is no image"),
    ],
)
def test_bad_tables(tmp_path, old, new, message):
    for name in ("Q3_1.png", "Q1_2.png"):
        save_image(tmp_path, name, (1680, 1050))
    (tmp_path / "table.csv").write_text(SHELF.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_shelves(tmp_path / "table.csv", tmp_path)


def test_custom_trials(tmp_path):
    save_image(tmp_path, "a.png", (30, 20))
    lines = [
        {
            "image": "a.png",
            "boxes": [[0, 0, 10, 20], [10, 0, 30, 20]],
            "target_index": 1,
            "fixations": [[2, 2], [20, 5]],
        },
        {"image": "a.png", "grid": [2, 3], "size": [30, 20], "target_index": 5, "scanpath": [0, 5]},
    ]
    file = tmp_path / "trials.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [trial.scanpath for trial in read_trials(file)] == [[0, 1], [0, 5]]
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps({**lines[1], "target_index": 6}))
    with pytest.raises(ValueError, match="line 2: Object 6 is out of range"):
        read_trials(file)
    file.write_text(json.dumps({"image": "a.png"}))
    with pytest.raises(ValueError, match="line 1: there is no 'boxes'"):
        read_trials(file)


def test_split_keeps_images_together():
    trials = SceneGenerator(rows=2, columns=3).trials(11, searches=3, seed=0)
    parts = split_by_image(trials, seed=1)
    assert sum(map(len, parts)) == 33
    images = [{trial.image_id for trial in part} for part in parts]
    assert [len(names) for names in images] == [9, 1, 1]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert [len(part) for part in split_by_image(trials[:9])] == [3, 3, 3]
    with pytest.raises(ValueError, match="2 images cannot be split into 3 parts"):
        split_by_image(trials[:6])


def test_long_scanpaths_are_dropped():
    boxes = torch.tensor([[0, 0, 1, 1]])
    trials = [Trial("a", "a.png", boxes, 0, [0] * length) for length in [3] * 30 + [90]]
    assert len(without_outliers(trials)) == 30


def test_simulated_searches_end_at_the_target_and_are_repeatable():
    trials = SceneGenerator().trials(20, searches=2, seed=3)
    assert [trial.scanpath for trial in trials] == [t.scanpath for t in SceneGenerator().trials(20, 2, seed=3)]
    assert np.mean([trial.scanpath[-1] == trial.target_index for trial in trials]) > 0.9
    assert max(len(trial.scanpath) for trial in trials) <= 24


def test_baselines_end_at_the_target():
    generator = np.random.default_rng(0)
    (trial,) = SceneGenerator().trials(1, searches=1, seed=0)
    for _ in range(10):
        walk = random_walk(trial, 30, generator)
        steps = np.abs(np.diff(np.stack(np.divmod(walk, 6)), axis=1)).max(0)
        assert (steps == 1).all()
        assert trial.target_index not in walk[:-1] and len(walk) <= 30
        path = saliency_walk(trial, 30, generator, OATImageProcessor())
        assert path[-1] == trial.target_index and len(set(path)) == len(path)


def test_people_agree_with_themselves():
    trials = SceneGenerator().trials(3, searches=2, seed=0)
    metrics = evaluate_predictions(trials, [[trial.scanpath] for trial in trials])
    assert metrics["delta"] == 0
    assert metrics["sequence_score"] == metrics["multimatch_vector"] == metrics["multimatch_position"] == 1
    assert metrics["edit_distance"] == 0
    assert metrics["nss"] > 10
