"""Predictions for the tasks of the paper's evaluation, from datasets in the form that lmms-eval takes them from.

The scores are those tasks' own and not computed here. Tested on made-up rows of the same columns; the real datasets have
not been run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .generation import FocusedImage, SdRpnGenerator
from .regions import Box


if TYPE_CHECKING:
    from datasets import Dataset


_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class EvaluationTask:
    """Columns of a task's dataset, and the form of its questions.

    Attributes:
        dataset: Hub id.
        question, identifier, reference: columns; the image is in `image`.
        instruction: text after the question.
        max_new_tokens: longest answer.
    """

    dataset: str
    question: str
    identifier: str
    reference: str
    instruction: str
    max_new_tokens: int

    def prompt(self, row: Mapping[str, Any]) -> str:
        return row[self.question] + self.instruction


#: name, as of the thresholds in the configuration -> task
TASKS = {
    "textvqa": EvaluationTask("lmms-lab/textvqa", "question", "question_id", "answers", _SHORT_ANSWER, 16),
    "docvqa": EvaluationTask("lmms-lab/DocVQA", "question", "questionId", "answers", _SHORT_ANSWER, 128),
    "vstar": EvaluationTask(
        "lmms-lab/vstar-bench",
        "text",
        "question_id",
        "label",
        "\nAnswer with the option's letter from the given choices directly.",
        16,
    ),
}


@dataclass(frozen=True)
class Prediction:
    """An answer to a row of a task.

    Attributes:
        identifier: of the row.
        text: the answer.
        reference: what the dataset holds as right: answers, or the letter of one; `None` in a split without.
        image: where the model looked.
    """

    identifier: Any
    text: str
    reference: Any
    image: FocusedImage

    @property
    def boxes(self) -> list[Box]:
        """The regions in pixels of the image."""
        return self.image.boxes


def predictions(
    generator: SdRpnGenerator,
    dataset: "Dataset | Sequence[Mapping[str, Any]]",
    task: str,
    *,
    batch_size: int = 1,
    progress: bool = True,
    **generate_kwargs,
) -> Iterator[Prediction]:
    """Answer the rows of a task's split with the paper's threshold for the task.

    Args:
        generator: base, network and processor.
        dataset: a split with the task's columns, see [`TASKS`]; a part of one is `dataset.select(range(100))`.
        task: `textvqa`, `docvqa` or `vstar`.
        batch_size: rows to answer at once.
        progress: show a bar.
        generate_kwargs: for the base's `generate`; greedy, with the task's longest answer, if nothing else is said. A
            `threshold` takes the place of the task's.

    Raises:
        ValueError: if the task is not known or the dataset lacks a column, before anything is computed.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}. Tasks: {', '.join(TASKS)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    kind = TASKS[task]
    columns = dataset.column_names if hasattr(dataset, "column_names") else list(dataset[0])
    missing = [column for column in ("image", kind.question, kind.identifier) if column not in columns]
    if missing:
        raise ValueError(
            f"The dataset lacks the columns {', '.join(missing)} of {task} (as in {kind.dataset}); it has "
            f"{', '.join(columns)}."
        )
    options = {"max_new_tokens": kind.max_new_tokens, "do_sample": False, **generate_kwargs}
    if "threshold" not in options:
        options["task"] = task
    return _answers(generator, dataset, kind, batch_size, progress, options)


def _answers(
    generator: SdRpnGenerator, dataset, kind: EvaluationTask, batch_size: int, progress: bool, options: dict[str, Any]
) -> Iterator[Prediction]:
    for start in tqdm(range(0, len(dataset), batch_size), disable=not progress):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        answers = generator.generate([kind.prompt(row) for row in rows], [row["image"] for row in rows], **options)
        for row, answer in zip(rows, answers, strict=True):
            yield Prediction(row[kind.identifier], answer.text, row.get(kind.reference), answer.images[0])


def box_iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes `(x0, y0, x1, y1)` with ends exclusive; zero if both are empty."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    both = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - common
    return common / both if both > 0 else 0.0


__all__ = ["TASKS", "EvaluationTask", "Prediction", "box_iou", "predictions"]
