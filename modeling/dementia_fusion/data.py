"""Recordings with transcripts, labels and speakers: tables of them, their split by speaker, and batches."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .processing_dementia_fusion import DementiaFusionProcessor
from .transcripts import read_chat


#: modalities of the input
MODALITIES = ("both", "text", "audio")


@dataclass(frozen=True)
class Recording:
    """A recording.

    Attributes:
        audio: as the processor takes it.
        text: the transcript.
        label: class, as a number.
        speaker: id of the speaker; the splits share no speakers.
    """

    audio: Any
    text: str
    label: int
    speaker: str


def read_table(path: str | Path) -> tuple[list[Recording], list[str]]:
    """Read a CSV with the columns `audio`, `text` (or `transcript`, a file), `label` and `speaker`.

    Paths are relative to the table. A transcript file is plain text, or CHAT (`.cha`), of which the participant's words are taken.

    Returns:
        The recordings, and the names of the classes in the order of their numbers: sorted, and controls first if a class is called
        `control`, `cc`, `hc` or `0`.

    Raises:
        ValueError: for missing columns, empty fields, files that are not there and fewer than two classes.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path.name} has no rows.")
    missing = {"audio", "label", "speaker"} - set(rows[0])
    if missing or not {"text", "transcript"} & set(rows[0]):
        raise ValueError(
            f"{path.name} needs the columns audio, label, speaker, and text or transcript; it has {', '.join(rows[0])}."
        )
    first = ("control", "cc", "hc", "0")
    classes = sorted({row["label"] for row in rows}, key=lambda name: (name.lower() not in first, name))
    if len(classes) < 2:
        raise ValueError(f"{path.name} has only one class: {', '.join(classes)}.")
    recordings = []
    for number, row in enumerate(rows, start=2):
        empty = [name for name in ("audio", "label", "speaker") if not row[name]]
        if empty:
            raise ValueError(f"{path.name}, line {number}: {', '.join(empty)} is empty.")
        audio = path.parent / row["audio"]
        if not audio.is_file():
            raise ValueError(f"{path.name}, line {number}: there is no file {row['audio']}.")
        try:
            text = row.get("text") or _read_transcript(path.parent, row.get("transcript"))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        recordings.append(Recording(str(audio), text, classes.index(row["label"]), row["speaker"]))
    return recordings, classes


def _read_transcript(folder: Path, name: str | None) -> str:
    if not name:
        raise ValueError("there is neither a text nor a transcript.")
    file = folder / name
    if not file.is_file():
        raise ValueError(f"there is no file {name}.")
    content = file.read_text(encoding="utf-8")
    return read_chat(content) if file.suffix == ".cha" else content.strip()


def split_by_speaker(
    recordings: Sequence[Recording], shares: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0
) -> list[list[Recording]]:
    """Split into parts that share no speaker, each with the classes in about the same proportions.

    Raises:
        ValueError: if a speaker has recordings of several classes, or a part would lack a class.
    """
    classes: dict[str, int] = {}
    for recording in recordings:
        if classes.setdefault(recording.speaker, recording.label) != recording.label:
            raise ValueError(f"Speaker {recording.speaker} has recordings of several classes.")
    generator = np.random.default_rng(seed)
    part_of = {}
    for label in sorted(set(classes.values())):
        speakers = generator.permutation(sorted(speaker for speaker, own in classes.items() if own == label))
        if len(speakers) < len(shares):
            raise ValueError(
                f"Class {label} has {len(speakers)} speakers, which are too few for {len(shares)} splits without "
                "common speakers."
            )
        # Each part gets a speaker at least.
        steps = np.arange(1, len(shares) + 1)
        ends = np.round(np.cumsum(shares) / sum(shares) * len(speakers)).astype(int)
        ends = np.clip(ends, steps, len(speakers) - len(shares) + steps)
        for part, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            part_of |= dict.fromkeys(speakers[start:end], part)
    return [
        [recording for recording in recordings if part_of[recording.speaker] == part] for part in range(len(shares))
    ]


class SpeechDataset(torch.utils.data.Dataset):
    """Recordings as inputs of the model, prepared once.

    Args:
        recordings: the recordings.
        processor: prepares them.
        truncation: cut off the end of transcripts that are too long.
    """

    def __init__(self, recordings: Sequence[Recording], processor: DementiaFusionProcessor, truncation: bool = False):
        self.recordings = list(recordings)
        self.items = []
        for recording in self.recordings:
            try:
                inputs = processor(audio=recording.audio, text=recording.text, truncation=truncation)
            except ValueError as error:
                raise ValueError(f"A recording of {recording.speaker}: {error}") from error
            self.items.append({name: tensor[0] for name, tensor in inputs.items()} | {"labels": recording.label})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass
class SpeechCollator:
    """Makes batches.

    Args:
        processor: whose tokenizer pads.
        modality: `"both"`; `"text"` for spectrograms that are zero; `"audio"` for transcripts without words.
    """

    processor: DementiaFusionProcessor
    modality: str = "both"

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        names = [name for name in tokenizer.model_input_names if name in items[0]]
        texts = [{name: item[name] for name in names} for item in items]
        if self.modality == "audio":
            texts = [tokenizer("") for _ in items]
        batch = dict(tokenizer.pad(texts, return_tensors="pt"))
        images = torch.stack([item["pixel_values"] for item in items])
        batch["pixel_values"] = torch.zeros_like(images) if self.modality == "text" else images
        batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch
