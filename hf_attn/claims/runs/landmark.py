"""Landmark attention: facts that a small model finds in texts far beyond its training length, reading four blocks, against a Llama of the
same shape and training, which reads everything.

Shown in small if at 8,192, 16,384 and 32,768 tokens the mean over seeds of right answers is at least 90 % for the landmark model and below
90 % for Llama, and a token after 32,768 takes the landmark model at most half as long again as one after 1,024. Contradicted if Llama
answers better at all three lengths.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from ...examples.landmark_recall import (
    LANDMARK,
    LLAMA,
    MEM_FREQ,
    MODELS,
    TOP_K,
    Settings,
    decode_seconds,
    draw_recall,
    evaluate,
    load,
    train,
)
from ..result import Conclusion, Figure


#: length of a text in tokens -> number of texts, with 8 questions each
LENGTHS, LENGTHS_MINIATURE = {512: 8, 2048: 8, 8192: 4, 16384: 3, 32768: 3}, {64: 1, 128: 1}
#: number of lengths, the longest ones, on which the verdict is based
FAR = 3
DECODED, DECODED_MINIATURE = (1024, 4096, 8192, 16384, 32768), (64, 128)
FOUND, FLAT = 0.9, 1.5


def measure(work) -> dict:
    settings = Settings(hidden_size=16, first_steps=2, steps=4, num_tokens=512) if work.miniature else Settings()
    lengths = LENGTHS_MINIATURE if work.miniature else LENGTHS
    sides = {
        name: [work.part(f"{name}-{seed}", learn, name, seed, settings, lengths, work.folder) for seed in work.seeds]
        for name in MODELS
    }
    decoded = DECODED_MINIATURE if work.miniature else DECODED
    seconds = {length: work.part(f"decode-{length}", decode_seconds, length, settings) for length in decoded}
    return {"right": sides, "decode": seconds}


def learn(name: str, seed: int, settings: Settings, lengths: Mapping[int, int], folder: Path) -> dict:
    """Train a model and evaluate it: the outcomes by length."""
    folder = train(
        name, settings, seed, folder / "models" / f"{name}-{seed}", disable_tqdm=True, logging_strategy="no"
    )
    model = load(name, folder)
    return {length: evaluate(model, length, count) for length, count in lengths.items()}


def shares(data: dict, name: str, length: str) -> list[float]:
    """Correct answers in percent, for each seed."""
    return [100 * run[length]["right"] for run in data["right"][name]]


def conclude(data: dict) -> Conclusion:
    far = list(data["right"][LANDMARK][0])[-FAR:]
    figures = [
        Figure.of(
            f"facts found at {int(length):,} tokens",
            "%",
            shares(data, LANDMARK, length),
            "Llama, all read",
            shares(data, LLAMA, length),
        )
        for length in reversed(far)
    ]
    blocks = int(far[-1]) // MEM_FREQ
    figures.append(Figure.of(f"blocks that a head reads for a token, of {blocks:,}", "%", 100 * TOP_K / blocks))
    (short, first), *_, (long, last) = data["decode"].items()
    for length, seconds in ((long, last), (short, first)):
        figures.append(
            Figure.of(
                f"time of a token after {int(length):,}", "ms", 1e3 * seconds[LANDMARK], "Llama", 1e3 * seconds[LLAMA]
            )
        )
    found, others = ([fmean(shares(data, name, length)) for length in far] for name in (LANDMARK, LLAMA))
    growth = last[LANDMARK] / first[LANDMARK]
    why = (
        f"At {', '.join(f'{int(length):,}' for length in far)} tokens the landmark model finds {_list(found)} % and Llama {_list(others)} %; "
        f"a token takes {growth:.2f} times as long after {int(long):,} as after {int(short):,}."
    )
    if all(theirs > ours for ours, theirs in zip(found, others, strict=True)):
        return Conclusion(tuple(figures), "contradicted here", why)
    shown = min(found) >= 100 * FOUND > max(others) and growth <= FLAT
    return Conclusion(tuple(figures), "shown in small" if shown else "not shown here", why)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def draw(data: dict, figure) -> None:
    found = {
        name: {int(length): [run[length] for run in runs] for length in runs[0]}
        for name, runs in data["right"].items()
    }
    draw_recall(found, figure.add_subplot())
    figure.set_layout_engine("constrained")
