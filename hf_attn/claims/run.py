"""Run a claim: measurements that are kept, a result and a figure."""

import datetime
import importlib
import io
import json
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..analysis.figures import new_figure
from ..catalog import PAPERS, get_paper
from ..training.output_folder import output_folder
from ..training.writing import written_whole
from . import runs
from .result import write_result


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
#: inches
FIGURE_SIZE = (6.4, 3.6)


class Work:
    """The settings of a run, and the folder with its finished parts.

    Attributes:
        seeds: seeds of the repetitions.
        miniature: whether to run a version that takes seconds.
    """

    def __init__(self, folder: Path, seeds: Sequence[int] = SEEDS, miniature: bool = False):
        self.folder, self.seeds, self.miniature = folder, tuple(seeds), miniature
        self.seconds, self.dates = 0.0, []

    def part(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The return value of `function` for the arguments, as JSON values; read from the folder if it was computed before."""
        path = self.folder / "parts" / f"{name}.json"
        finished = path.is_file()
        if not finished:
            print(f"  {name} ...", end="", flush=True)
            start = time.perf_counter()
            value = function(*arguments)
            record = {"value": value, "seconds": time.perf_counter() - start, "date": _today()}
            with written_whole(path) as part:
                part.write_text(json.dumps(record), encoding="utf-8")
        record = json.loads(path.read_text(encoding="utf-8"))
        print(f"  {name}: finished before" if finished else f" {record['seconds']:.1f} s", flush=True)
        self.seconds += record["seconds"]
        self.dates.append(record["date"])
        return record["value"]


def claims() -> tuple[str, ...]:
    """Slugs of the papers whose claim has a run, in the order of the catalogue."""
    modules = {module.name for module in pkgutil.iter_modules(runs.__path__)}
    return tuple(slug for slug in PAPERS if slug in modules)


def claim_module(slug: str) -> ModuleType:
    """The module of a claim.

    Raises:
        ValueError: if there is no such paper, or no run for it.
    """
    get_paper(slug)
    if slug not in claims():
        raise ValueError(f"The claim of {slug} has no run yet. Claims with a run: {', '.join(claims())}.")
    return importlib.import_module(f"{runs.__name__}.{slug}")


def run_claim(slug: str, output: str | Path, seeds: Sequence[int] = SEEDS, miniature: bool = False) -> dict[str, Any]:
    """Measure a claim; writes `<slug>.json` and `<slug>.png`.

    Args:
        slug: the paper.
        output: folder of this run. The finished parts of an interrupted run are reused.
        seeds: seeds of the repetitions.
        miniature: run a version that takes seconds, whose figures are meaningless.

    Returns:
        The result.

    Raises:
        ValueError: if there is no run for the paper, or the folder contains something else.
    """
    module, output = claim_module(slug), Path(output)
    settings = {"claim": slug, "seeds": list(seeds), "miniature": miniature}
    with output_folder(output, settings, command="hf-attn claim"), one_thread():
        work = Work(output, seeds, miniature)
        data = json.loads(json.dumps(module.measure(work)))
        figure = new_figure(*FIGURE_SIZE)
        module.draw(data, figure)
        with written_whole(output / f"{slug}.png") as part:
            _save_small(figure, part)
        return write_result(
            output / f"{slug}.json",
            slug,
            PAPERS[slug].claim,
            module.conclude(data),
            date=max(work.dates, default=_today()),
            seconds=round(work.seconds, 1),
            seeds=len(work.seeds),
            data=data,
        )


def _save_small(figure: "Figure", path: Path) -> None:
    """Write a PNG with few colours, a third of the size of matplotlib's."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=100, format="png")
    with Image.open(whole) as image:
        image.convert("RGB").quantize(64).save(path, format="PNG", optimize=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: times are comparable, and small models are as fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def store(slug: str, output: str | Path, results: str | Path) -> None:
    """Copy the result and the figure of a run into the folder from which the documentation is written."""
    for name in (f"{slug}.json", f"{slug}.png"):
        with written_whole(Path(results, name)) as part:
            part.write_bytes(Path(output, name).read_bytes())


def _today() -> str:
    return datetime.date.today().isoformat()
