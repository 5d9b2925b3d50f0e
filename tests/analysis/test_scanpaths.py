"""Scanpath metrics, against their definitions and against other implementations where the definitions agree."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_attn.analysis.scanpaths import (
    ScanpathMetrics,
    behaviour,
    behavioural_distance,
    edit_distance,
    fixation_map,
    multimatch,
    normalized_scanpath_saliency,
    object_similarity,
    sequence_score,
)


SCREEN = (1680, 1050)


def random_points(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform((0, 0), SCREEN, (length, 2))


def test_a_scanpath_is_like_itself():
    path = [3, 1, 1, 4]
    assert sequence_score(path, path) == 1
    assert edit_distance(path, path) == 0
    assert multimatch(random_points(0, 7), random_points(0, 7), SCREEN) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("a", "b", "score", "edits"),
    [
        ([1, 2, 3], [1, 3], 2 / 3, 1),
        ([1, 2], [3, 4, 5], 0, 3),
        ([], [1, 2], 0, 2),
        ([], [], 1, 0),
        ([1, 2], [2, 1], 0.5, 2),
    ],
)
def test_sequences(a, b, score, edits):
    assert sequence_score(a, b) == sequence_score(b, a) == pytest.approx(score)
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_behaviour_counts_search_refixations_and_revisits():
    found, length, *shares = behaviour([5, 5, 2, 5, 2, 2, 7], target=7)
    assert (found, length) == (1, 7)
    assert shares == pytest.approx([3 / 7, 2 / 7, 2 / 7])
    assert behaviour([5, 7, 5], target=7)[0] == 0
    with pytest.raises(ValueError, match="without fixations"):
        behaviour([], 1)


def test_behavioural_distance():
    people = [np.array([1, 4, 0.5, 0.25, 0.25]), np.array([0, 8, 0.5, 0.25, 0.25])]
    model = [np.array([1, 3, 0.5, 0.5, 0])]
    assert behavioural_distance(model, people) == pytest.approx((1 + 0.5 + 0 + 1 + 1) / 5)
    assert behavioural_distance(people, people) == 0
    never = [np.array([1, 3, 1, 0, 0])]
    assert behavioural_distance(never, never) == 0
    assert behavioural_distance(model, never) == np.inf
    with pytest.raises(ValueError, match="at least one"):
        behavioural_distance([], people)


def test_multimatch_is_the_packages_where_definitions_meet():
    """Against multimatch-gaze without its simplification step; random scanpaths have a unique best alignment."""
    reference = pytest.importorskip("multimatch_gaze", reason="the extra `test` has multimatch-gaze")
    for seed in range(5):
        a, b = random_points(seed, 6 + seed), random_points(seed + 50, 8)
        columns = {"names": ["start_x", "start_y", "duration"], "formats": [float] * 3}
        tables = [np.array([(*point, 0.1) for point in points], dtype=columns).view(np.recarray) for points in (a, b)]
        expected = reference.docomparison(*tables, screensize=list(SCREEN))
        vector, direction, length, position, _ = expected
        assert multimatch(a, b, SCREEN) == pytest.approx((vector, direction, length, position), abs=1e-9)


def test_short_scanpaths_are_filled_up():
    assert multimatch(np.array([[5.0, 5.0]]), np.array([[5.0, 5.0], [1, 1], [1, 1]]), SCREEN) == (1, 1, 1, 1)


def test_maps():
    saliency = fixation_map(np.array([[1.5, 0.2], [1, 0]]), (3, 2))
    assert saliency.tolist() == [[0, 1, 0], [0, 0, 0]]
    deviation = np.sqrt(1 / 6 * 5 / 6)
    assert normalized_scanpath_saliency(saliency, [[1, 0]]) == pytest.approx((1 - 1 / 6) / deviation)
    with pytest.raises(ValueError, match="outside the screen"):
        fixation_map(np.array([[3, 0]]), (3, 2))
    with pytest.raises(ValueError, match="a constant map"):
        normalized_scanpath_saliency(np.ones((2, 3)), [[1, 0]])


def test_similarity():
    assert object_similarity(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([1, 0])) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="the number of classes minus one"):
        object_similarity(np.ones((1, 2)), np.array([2]))


def test_compute_metrics_of_a_trainer():
    prediction = SimpleNamespace(
        predictions=np.array([[1, 2, -1, -100], [3, -1, -1, -1]]),
        label_ids=(np.array([[1, 2, -1], [4, 3, 3]]), np.array([2, 3])),
    )
    metrics = ScanpathMetrics()(prediction)
    assert metrics["sequence_score"] == pytest.approx((1 + 1 / 3) / 2)
    assert metrics["edit_distance"] == 1
    assert metrics["found"] == 1
    assert metrics["length"] == 1.5
    model, people = [behaviour([1, 2], 2), behaviour([3], 3)], [behaviour([1, 2], 2), behaviour([4, 3, 3], 3)]
    assert metrics["delta"] == behavioural_distance(model, people)
    with pytest.raises(ValueError, match="each trial needs"):
        ScanpathMetrics().compute([[1]], [[1]], [])
