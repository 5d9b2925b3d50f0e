"""The whole comparison: jobs in processes of their own, continued where they were, and one table at the end."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..training.output_folder import claim_output_folder
from ..training.text import train_tokenizer
from .data import Corpus
from .entries import BASELINE, Shape, default_entries, make_config, make_model
from .report import write_report


LENGTH = 128
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
VOCAB_SIZE = 1024
MIN_STEPS = 2


def _texts(data: str | None) -> tuple[list[str], list[str]]:
    from ..examples.assets import load_texts, read_texts

    if data is None:
        return load_texts("train"), load_texts("test")
    if Path(data).is_file():
        text = read_texts(file=data)[0]
        cut = len(text) * 9 // 10
        if not text[cut:].strip():
            raise ValueError(f"{data} has too little text to hold out a tenth of it.")
        return [text[:cut]], [text[cut:]]
    texts = read_texts("train", dataset_name=data)
    cut = max(1, len(texts) * 9 // 10)
    if cut == len(texts):
        raise ValueError(f"{data} has {len(texts)} texts; two at least are needed, one of which is held out.")
    return texts[:cut], texts[cut:]


def _seconds_a_step(entry: str, shape: Shape, corpus: Corpus) -> float:
    """Time of a training step, without the first one."""
    from .measure import train

    job = {"entry": entry, "seed": 0, "learning_rate": 0.0, "batch_size": BATCH_SIZE, "length": LENGTH}
    model = make_model(entry, shape)
    train(model, corpus, {**job, "steps": 1})
    start = time.perf_counter()
    train(model, corpus, {**job, "steps": 2})
    return (time.perf_counter() - start) / 2


def compare(
    output: str | Path,
    entries: list[str] | None = None,
    minutes: float = 20.0,
    seeds: int = 2,
    data: str | None = None,
    overwrite: bool = False,
) -> list[dict]:
    """Train the entries with the same budget and compare them; see the command `hf-attn compare`.

    All models are trained on the same tokens in the same order, with the same optimizer. The number of steps is chosen so that all trainings
    together take about the given time. Each training runs in a separate process; if one fails, its row contains the error.

    Args:
        output: folder for results, table and pictures. A comparison with the same settings is continued.
        entries: see [`make_config`]; all of the catalogue if not given. The first is the baseline.
        minutes: about how long the trainings take together.
        seeds: trainings of each entry.
        data: a text file or the Hub id of a data set with a column `text`; Python's documentation if not given.
        overwrite: start a new comparison; see [`claim_output_folder`].

    Returns:
        A result for each training, see [`measure`], or `{"entry", "seed", "error"}`.

    Raises:
        ValueError: for entries, texts or numbers that make no comparison.
    """
    entries = list(dict.fromkeys(entries or default_entries()))
    if minutes <= 0 or seeds < 1:
        raise ValueError(f"minutes must be above 0 and seeds at least 1, got {minutes} and {seeds}.")
    output = Path(output)
    texts, held_back = _texts(data)
    settings = {"entries": entries, "minutes": minutes, "seeds": seeds, "data": data}
    claim_output_folder(output, settings, overwrite)

    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    corpus = Corpus.from_texts(texts, held_back, tokenizer)
    shape = Shape(vocab_size=corpus.vocab_size, max_position_embeddings=4 * LENGTH)
    for entry in entries:
        make_config(entry, shape)  # names and fields are checked before anything is trained
    save_file({"train": corpus.train, "test": corpus.test}, output / "corpus.safetensors")

    plan_file = output / "plan.json"
    if not plan_file.is_file():
        seconds = {entry: _timed(entry, shape, corpus) for entry in tqdm(entries, desc="time of a step")}
        together = sum(time for time in seconds.values() if time is not None) * seeds
        steps = max(MIN_STEPS, int(60 * minutes / together)) if together else MIN_STEPS
        plan_file.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    steps = json.loads(plan_file.read_text(encoding="utf-8"))["steps"]

    jobs = [
        {
            "entry": entry,
            "seed": seed,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "length": LENGTH,
            "learning_rate": LEARNING_RATE,
            "shape": asdict(shape),
            "corpus": str(output / "corpus.safetensors"),
            "first_symbol": corpus.first_symbol,
        }
        for seed in range(seeds)
        for entry in entries
    ]
    results = [_run(job, output, entries.index(job["entry"])) for job in tqdm(jobs, desc="trainings")]
    write_report(results, output, entries[0] if BASELINE not in entries else BASELINE, steps)
    return results


def _timed(entry: str, shape: Shape, corpus: Corpus) -> float | None:
    try:
        return _seconds_a_step(entry, shape, corpus)
    except Exception:  # it fails again in its own process, whose message goes into its row
        return None


def _run(job: dict, output: Path, number: int) -> dict:
    name = f"{number:02}-{job['seed']}"
    result_file = output / "results" / f"{name}.json"
    if result_file.is_file():
        return json.loads(result_file.read_text(encoding="utf-8"))
    result_file.parent.mkdir(exist_ok=True)
    job_file = output / "results" / f".{name}-job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "hf_attn.comparison.measure", str(job_file), str(result_file)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    job_file.unlink()
    if done.returncode == 0:
        return json.loads(result_file.read_text(encoding="utf-8"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"entry": job["entry"], "seed": job["seed"], "error": lines[-1] if lines else f"exit {done.returncode}"}
