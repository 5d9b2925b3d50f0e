"""Associative recall in filler text: a text states facts among meaningless tokens, and queries them at its end.

A fact is one token for a key with its value. A question is the token of a key alone, and its answer that of a value alone, so that a
model has to find the fact with this key and to say which value it has.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset


IGNORED = -100
#: tokens of a question with its answer
QUESTION = 2


@dataclass(frozen=True)
class RecallText:
    """A text and its questions.

    Attributes:
        input_ids: tokens, see [`RecallTask`].
        labels: the queried values, -100 elsewhere.
        questions: positions of the queried keys; each value follows its key.
        facts: for each question, the place of its fact.
    """

    input_ids: list[int]
    labels: list[int]
    questions: list[int]
    facts: list[int]


@dataclass(frozen=True)
class RecallTask:
    """The vocabulary of the texts: a token for each pair of a key and a value, keys, values, filler.

    Args:
        num_keys: keys of facts.
        num_values: values of facts.
        num_filler: tokens that stand between facts.
    """

    num_keys: int = 16
    num_values: int = 10
    num_filler: int = 16

    @property
    def vocab_size(self) -> int:
        return self.num_keys * self.num_values + self.num_keys + self.num_values + self.num_filler

    def text(self, length: int, num_facts: int, generator: random.Random, questions: int | None = None) -> RecallText:
        """Draw a text.

        Args:
            length: tokens of the text.
            num_facts: facts, with different keys.
            generator: of the random numbers.
            questions: how many, each for any of the facts; if not given, each fact is queried once. Training uses the former:
                if no fact is repeated, a model first learns to guess by excluding the facts that have been queried.

        Raises:
            ValueError: if there are not so many keys, or the facts and questions do not fit.
        """
        if not 1 <= num_facts <= self.num_keys:
            raise ValueError(f"num_facts must be between 1 and {self.num_keys}, the number of keys, got {num_facts}.")
        count = num_facts if questions is None else questions
        body = length - QUESTION * count
        if body < num_facts:
            needed = num_facts + QUESTION * count
            raise ValueError(f"{num_facts} facts and {count} questions take {needed} tokens, but length is {length}.")
        first_key = self.num_keys * self.num_values
        first_value = first_key + self.num_keys
        first_filler = first_value + self.num_values
        ids = generator.choices(range(first_filler, self.vocab_size), k=body)
        keys = generator.sample(range(self.num_keys), num_facts)
        values = generator.choices(range(self.num_values), k=num_facts)
        places = generator.sample(range(body), num_facts)
        for place, key, value in zip(places, keys, values, strict=True):
            ids[place] = key * self.num_values + value
        facts = range(num_facts)
        order = generator.sample(facts, count) if questions is None else generator.choices(facts, k=count)
        for fact in order:
            ids += [first_key + keys[fact], first_value + values[fact]]
        asked = list(range(body, length, QUESTION))
        labels = [IGNORED] * length
        for question in asked:
            labels[question + 1] = ids[question + 1]
        return RecallText(ids, labels, asked, [places[fact] for fact in order])


@dataclass(frozen=True)
class Stage:
    """Texts that a training takes from some time on.

    Attributes:
        start: share of the steps after which they begin.
        length, num_facts, questions: see [`RecallTask.text`].
    """

    start: float
    length: int
    num_facts: int
    questions: int


class RecallBatches(Dataset):
    """One batch for each step: texts of one of the stages that have begun, as many as make `num_tokens`.

    Args:
        task: the vocabulary.
        stages: the curriculum.
        steps: steps of the training.
        num_tokens: tokens of a batch.
        seed: the same seed gives the same batches.
    """

    def __init__(self, task: RecallTask, stages: Sequence[Stage], steps: int, num_tokens: int, seed: int | str):
        self.task, self.stages, self.steps, self.num_tokens, self.seed = task, stages, steps, num_tokens, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[dict[str, list[int]]]:
        generator = random.Random(f"{self.seed} {step}")
        stage = generator.choice([stage for stage in self.stages if stage.start * self.steps <= step])
        count = max(1, self.num_tokens // stage.length)
        texts = [self.task.text(stage.length, stage.num_facts, generator, stage.questions) for _ in range(count)]
        return [{"input_ids": text.input_ids, "labels": text.labels} for text in texts]
