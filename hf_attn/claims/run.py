"""Run a claim: measurements that are kept, a result and a picture."""

import datetime
import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..analysis.figures import new_figure
from ..catalog import PAPERS, get_paper
from ..training.output_folder import output_folder
from ..training.writing import written_whole
from . import runs
from .result import write_result


SEEDS = (0, 1, 2)
#: inches
PICTURE_SIZE = (6.4, 3.6)


class Work:
    """What a run is to do, and where it keeps what it has done.

    Attributes:
        seeds: seeds of whatever is random.
        miniature: whether a size of seconds is asked for.
    """

    def __init__(self, folder: Path, seeds: Sequence[int] = SEEDS, miniature: bool = False):
        self.folder, self.seeds, self.miniature = folder, tuple(seeds), miniature
        self.seconds, self.dates = 0.0, []

    def part(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns for the arguments, as JSON values; read from the folder if it is there already."""
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
    """Slugs of the papers whose claim can be run, in the order of the catalogue."""
    modules = {module.name for module in pkgutil.iter_modules(runs.__path__)}
    return tuple(slug for slug in PAPERS if slug in modules)


def claim_module(slug: str) -> ModuleType:
    """The module of a claim.

    Raises:
        ValueError: if there is no such paper, or no run for it.
    """
    get_paper(slug)
    if slug not in claims():
        raise ValueError(f"The claim of {slug} has no run yet. Those that have: {', '.join(claims())}.")
    return importlib.import_module(f"{runs.__name__}.{slug}")


def run_claim(slug: str, output: str | Path, seeds: Sequence[int] = SEEDS, miniature: bool = False) -> dict[str, Any]:
    """Measure a claim; writes `<slug>.json` and `<slug>.png`.

    Args:
        slug: the paper.
        output: folder of this run. The finished parts of a run that was stopped are used.
        seeds: seeds of whatever is random.
        miniature: a size of seconds, whose figures mean nothing.

    Returns:
        The result.

    Raises:
        ValueError: if there is no run for the paper, or the folder holds something else.
    """
    module, output = claim_module(slug), Path(output)
    settings = {"claim": slug, "seeds": list(seeds), "miniature": miniature}
    with output_folder(output, settings, command="hf-attn claim"):
        work = Work(output, seeds, miniature)
        data = json.loads(json.dumps(module.measure(work)))
        figure = new_figure(*PICTURE_SIZE)
        module.draw(data, figure)
        with written_whole(output / f"{slug}.png") as part:
            figure.savefig(part, dpi=100, format="png")
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


def store(slug: str, output: str | Path, results: str | Path) -> None:
    """Copy the result and the picture of a run into the folder that the documentation is written from."""
    for name in (f"{slug}.json", f"{slug}.png"):
        with written_whole(Path(results, name)) as part:
            part.write_bytes(Path(output, name).read_bytes())


def _today() -> str:
    return datetime.date.today().isoformat()
