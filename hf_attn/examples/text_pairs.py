"""Pairs of related texts, from the headings and paragraphs of Python's documentation."""

import re
from dataclasses import dataclass

from .assets import load_texts


_RULES = re.compile(r"[*=\-^~]{3,}")
_MIN_WORDS = 8


@dataclass(frozen=True)
class TextPair:
    """A query and the text that answers it.

    Attributes:
        query, positive: the texts.
        task: relation of the texts: `"heading"` (a heading and a paragraph below it) or `"neighbour"` (a paragraph and the
            next one).
        topic: first line of the document.
    """

    query: str
    positive: str
    task: str
    topic: str


def text_pairs(split: str = "train") -> list[TextPair]:
    """Pairs from the topics of [`~hf_attn.examples.assets.load_texts`]; no positive appears twice in a task.

    Args:
        split: `"train"` or `"test"`, which share no topic.
    """
    pairs, seen = [], set()
    for text in load_texts(split):
        topic, heading, previous, under_heading = text.split("\n", 1)[0].strip(), None, None, 0
        for block in re.split(r"\n\s*\n", text):
            lines = block.strip().splitlines()
            if len(lines) == 2 and _RULES.fullmatch(lines[1].strip()):
                heading, previous, under_heading = lines[0].strip(), None, 0
                continue
            paragraph = " ".join(block.split())
            if len(paragraph.split()) < _MIN_WORDS:
                continue
            queries = {"neighbour": previous, "heading": heading if under_heading < 3 else None}
            for task, query in queries.items():
                if query is not None and (task, paragraph) not in seen:
                    seen.add((task, paragraph))
                    pairs.append(TextPair(query, paragraph, task, topic))
            previous, under_heading = paragraph, under_heading + 1
    return pairs
