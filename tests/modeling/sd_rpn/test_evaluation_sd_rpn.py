"""Predictions for evaluation tasks, on synthetic rows with the columns of the real datasets."""

import datasets
import pytest

from hf_attn.modeling.sd_rpn.evaluation import TASKS, box_iou, predictions
from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator

from .tiny import BASES, GRID, blob, force_maps, picture, tiny_base, tiny_processor, tiny_rpn


COLUMNS = {
    "textvqa": {"question_id": [34602, 34603, 34604], "question": ["who", "what", "when"], "answers": [["a"]] * 3},
    "docvqa": {"questionId": ["7", "8", "9"], "question": ["who", "what", "when"], "answers": [["a"], ["b"], ["c"]]},
    "vstar": {
        "question_id": ["0", "1", "2"],
        "text": ["(A) x (B) y"] * 3,
        "label": ["A", "B", "A"],
        "category": ["c"] * 3,
    },
}


def split(task: str) -> datasets.Dataset:
    images = [picture(90, 60), picture(60, 90, seed=1), picture(70, 70, seed=2)]
    return datasets.Dataset.from_dict({"image": images, **COLUMNS[task]}).cast_column("image", datasets.Image())


def generator(kind: str = "llava") -> SdRpnGenerator:
    return SdRpnGenerator(tiny_base(kind), tiny_rpn(kind), tiny_processor(kind))


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_answered_with_the_tasks_question_and_threshold(task, monkeypatch):
    focus, rows, calls = generator(), split(task), []

    def generate(prompts, images, **options):
        calls.append((prompts, options))
        return original(prompts, images, **{**options, "max_new_tokens": 2})

    original = focus.generate
    monkeypatch.setattr(focus, "generate", generate)
    found = list(predictions(focus, rows, task, batch_size=2, progress=False))
    kind = TASKS[task]
    assert [prediction.identifier for prediction in found] == COLUMNS[task][kind.identifier]
    assert [prediction.reference for prediction in found] == COLUMNS[task][kind.reference]
    assert [len(prompts) for prompts, _ in calls] == [2, 1]
    assert calls[0][0][0] == COLUMNS[task][kind.question][0] + kind.instruction
    assert calls[0][1] == {"task": task, "do_sample": False, "max_new_tokens": kind.max_new_tokens}
    assert {prediction.image.threshold for prediction in found} == {focus.rpn.config.threshold(task)}
    alone = focus.generate([calls[0][0][1]], [rows[1]["image"]], task=task, do_sample=False)
    assert found[1].text == alone[0].text


@pytest.mark.parametrize("kind", BASES)
def test_where_the_model_looked_comes_with_the_answer(kind):
    focus = generator(kind)
    rows = split("vstar").select([2])
    if kind != "qwen2_5_vl":
        force_maps(focus.rpn, blob((GRID, GRID), (1, 2, 4, 5)))
    (found,) = predictions(focus, rows, "vstar", progress=False, threshold=0.5, max_new_tokens=2)
    assert found.image.threshold == 0.5
    assert found.image.image.size == (70, 70)
    assert found.boxes == found.image.boxes
    if kind != "qwen2_5_vl":
        assert len(found.boxes) == 1


def test_a_split_without_answers_has_no_references():
    rows = split("docvqa").remove_columns("answers").select([0])
    (found,) = predictions(generator(), rows, "docvqa", progress=False, max_new_tokens=2)
    assert found.reference is None


def test_bad_input_is_refused_before_any_computation():
    rows = split("textvqa")
    with pytest.raises(ValueError, match=r"There is no task 'mmmu'\. Tasks: textvqa, docvqa, vstar"):
        predictions(None, rows, "mmmu")
    with pytest.raises(ValueError, match=r"lacks the columns text of vstar \(as in lmms-lab/vstar-bench\)"):
        predictions(None, rows, "vstar")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predictions(None, rows, "textvqa", batch_size=0)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0, 0, 10, 10), 1.0),
        ((5, 0, 15, 10), 1 / 3),
        ((10, 0, 20, 10), 0.0),
        ((2, 2, 7, 7), 0.25),
        ((3, 3, 3, 3), 0.0),
    ],
)
def test_intersection_over_union(other, expected):
    assert box_iou((0, 0, 10, 10), other) == pytest.approx(expected)
    assert box_iou(other, (0, 0, 10, 10)) == pytest.approx(expected)
    assert box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0.0
