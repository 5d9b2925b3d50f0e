"""The result of a run: measured figures, those of the peers, and a verdict."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ..training.writing import written_whole


#: shown: exact, such as a count
VERDICTS = ("shown", "shown in small", "not shown here", "contradicted here")


@dataclass(frozen=True)
class Figure:
    """A measured quantity, and the same quantity of a peer in the same run.

    Attributes:
        name: what was measured.
        unit: its unit, such as `"%"`; empty for a plain number.
        value: the figure, or its mean over seeds.
        spread: standard deviation over seeds, if there are several.
        peer: what it is compared with; empty if there is no comparison.
        peer_value, peer_spread: the same for the peer.
    """

    name: str
    unit: str
    value: float
    spread: float | None = None
    peer: str = ""
    peer_value: float | None = None
    peer_spread: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        values: float | Sequence[float],
        peer: str = "",
        peer_values: float | Sequence[float] | None = None,
    ) -> "Figure":
        """A figure from one value, or from one value per seed."""
        own, others = _summary(values), (None, None) if peer_values is None else _summary(peer_values)
        return cls(name, unit, *own, peer, *others)

    def __str__(self) -> str:
        text = f"{self.name} {_measured(self.value, self.spread, self.unit)}"
        if self.peer_value is None:
            return text
        return f"{text} ({self.peer}: {_measured(self.peer_value, self.peer_spread, self.unit)})"


@dataclass(frozen=True)
class Conclusion:
    """The conclusion from the measurements of a run.

    Attributes:
        figures: the most important one first.
        verdict: one of [`VERDICTS`].
        why: one sentence that states what decided.
    """

    figures: tuple[Figure, ...]
    verdict: str
    why: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(map(repr, VERDICTS))}, got {self.verdict!r}.")


def agreement(values: Sequence[float], peer_values: Sequence[float]) -> int:
    """Whether the seeds agree that one side is larger.

    Args:
        values, peer_values: one for each seed, in the same order.

    Returns:
        1 or -1 if the difference has this sign for each seed, and its mean exceeds its standard deviation; else 0.
    """
    differences = [a - b for a, b in zip(values, peer_values, strict=True)]
    spread = stdev(differences) if len(differences) > 1 else 0.0
    if abs(fmean(differences)) <= spread:
        return 0
    return int(all(d > 0 for d in differences)) - int(all(d < 0 for d in differences))


def write_result(path: str | Path, slug: str, claim: str, conclusion: Conclusion, **facts: Any) -> dict[str, Any]:
    """Write a result with the command and the class of machine that produced it; `facts` are further entries.

    Returns:
        What was written.
    """
    record = {
        "slug": slug,
        "claim": claim,
        "verdict": conclusion.verdict,
        "why": conclusion.why,
        "figures": [asdict(figure) for figure in conclusion.figures],
        "command": f"hf-attn claim {slug}",
        "machine": machine_class(),
        **facts,
    }
    with written_whole(path) as part:
        part.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    return record


def read_result(folder: str | Path, slug: str) -> dict[str, Any] | None:
    """The result of a paper in a folder, or None if there is none.

    Raises:
        ValueError: if the file is not a result.
    """
    path = Path(folder, f"{slug}.json")
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        figures_of(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not contain a result of `hf-attn claim`: {error}") from error
    return record


def figures_of(record: dict[str, Any]) -> tuple[Figure, ...]:
    """The figures of a result."""
    return tuple(Figure(**figure) for figure in record["figures"])


def machine_class() -> str:
    """The class of this machine, such as `2 cores of x86-64 (1 used), no GPU`."""
    cores, processor = os.cpu_count() or 1, platform.machine().replace("_", "-")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores} {'core' if cores == 1 else 'cores'} of {processor} ({torch.get_num_threads()} used), {gpu}"


def _summary(values: float | Sequence[float]) -> tuple[float, float | None]:
    if not isinstance(values, Sequence):
        return float(values), None
    return fmean(values), stdev(values) if len(values) > 1 else None


def _measured(value: float, spread: float | None, unit: str) -> str:
    text = number_text(value) if spread is None else f"{number_text(value)} ± {spread:.2g}"
    return f"{text} {unit}".rstrip()


def number_text(value: float) -> str:
    """A number with at least three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
