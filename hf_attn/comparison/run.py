"""The comparison: jobs in separate processes, resumed after an interruption, and one table at the end."""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..training.output_folder import output_folder
from ..training.text import train_tokenizer
from ..training.writing import written_whole
from .data import Corpus
from .entries import BASELINE, Shape, default_entries, make_config, make_model
from .report import write_report


LENGTH = 128
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
VOCAB_SIZE = 1024
MIN_STEPS = 2
#: steps of a trial run, from which the number of steps is calculated
TRIAL_STEPS = 4


def _texts(data: str | None) -> tuple[list[str], list[str]]:
    from ..examples.assets import load_texts, read_texts

    if data is None:
        return load_texts("train"), load_texts("test")
    if Path(data).suffix in (".txt", ".md", ".json", ".jsonl", ".csv") and not Path(data).exists():
        raise ValueError(f"There is no file {data}.")
    if Path(data).is_file():
        try:
            text = read_texts(file=data)[0]
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        cut = len(text) * 9 // 10
        if not text[cut:].strip():
            raise ValueError(f"{data} has too little text to hold out a tenth of it. Use a longer text.")
        return [text[:cut]], [text[cut:]]
    texts = read_texts("train", dataset_name=data)
    cut = max(1, len(texts) * 9 // 10)
    if cut == len(texts):
        raise ValueError(f"{data} has {len(texts)} texts, but at least two are needed, one of which is held out.")
    return texts[:cut], texts[cut:]


def _corpus(data: str | None) -> Corpus:
    """The tokenised texts; raises `ValueError` if there are too few tokens."""
    texts, held_out = _texts(data)
    corpus = Corpus.from_texts(texts, held_out, train_tokenizer(texts, VOCAB_SIZE))
    for name, tokens, least in (("training", corpus.train, LENGTH + 1), ("held-out", corpus.test, 4 * LENGTH)):
        if len(tokens) < least:
            raise ValueError(
                f"The {name} text has {len(tokens)} tokens, but at least {least} are needed. Use a longer text."
            )
    return corpus


def compare(
    output: str | Path,
    entries: list[str] | None = None,
    minutes: float = 20.0,
    seeds: int = 2,
    data: str | None = None,
    overwrite: bool = False,
) -> list[dict]:
    """Train the entries with the same budget and compare them; see the command `hf-attn compare`.

    All models are trained on the same tokens in the same order, with the same optimizer, for the same number of steps. The number
    of steps is chosen so that the whole comparison takes about the given time. Each training runs in a separate process; if one
    fails, its row contains the error.

    Args:
        output: folder for results, table and plots. A comparison with the same settings is continued.
        entries: see [`make_config`]; by default all of the catalogue. The first one is the baseline.
        minutes: approximate duration, including training and measurements.
        seeds: number of training runs of each entry.
        data: a text file or the Hub id of a dataset with a column `text`; Python's documentation by default.
        overwrite: start a new comparison; see [`output_folder`].

    Returns:
        A result for each training, see [`measure`], or `{"entry", "seed", "error"}`.

    Raises:
        ValueError: for invalid entries, texts or numbers.
        OutputFolderError: if the folder contains something else, or another comparison is running in it.
    """
    start = time.perf_counter()
    entries = list(dict.fromkeys(entries or default_entries()))
    if not 0 < minutes < math.inf or seeds < 1:
        raise ValueError(f"minutes must be above 0 and seeds at least 1, got {minutes} and {seeds}.")
    settings = {"entries": entries, "minutes": minutes, "seeds": seeds, "data": data}
    with output_folder(output, settings, overwrite, command="hf-attn compare"):
        corpus = _corpus(data)
        shape = Shape(vocab_size=corpus.vocab_size, max_position_embeddings=4 * LENGTH)
        for entry in entries:
            make_config(entry, shape)  # names and fields are checked before anything is trained
        return _compare(Path(output), entries, start + 60 * minutes, seeds, corpus, shape)


def _compare(
    output: Path, entries: list[str], deadline: float, seeds: int, corpus: Corpus, shape: Shape
) -> list[dict]:
    save_file({"train": corpus.train, "test": corpus.test}, output / "corpus.safetensors")

    def job(entry: str, seed: int, steps: int) -> dict:
        return {
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

    plan_file = output / "plan.json"
    if not plan_file.is_file():
        times = {entry: _seconds_a_step(job(entry, 0, TRIAL_STEPS), corpus) for entry in tqdm(entries, desc="trials")}
        a_step = seeds * sum(time for time in times.values() if time is not None)
        working = [entry for entry in entries if times[entry] is not None]
        apart = _seconds_apart(job(working[0], 0, TRIAL_STEPS), output) if working else 0.0
        left = deadline - time.perf_counter() - seeds * len(entries) * apart
        steps = max(MIN_STEPS, int(left / a_step)) if a_step else MIN_STEPS
        with written_whole(plan_file) as part:
            part.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    steps = json.loads(plan_file.read_text(encoding="utf-8"))["steps"]

    jobs = [job(entry, seed, steps) for seed in range(seeds) for entry in entries]
    results = [_run(job, output, entries.index(job["entry"])) for job in tqdm(jobs, desc="trainings")]
    write_report(results, output, entries[0] if BASELINE not in entries else BASELINE, steps)
    return results


def _seconds_a_step(job: dict, corpus: Corpus) -> float | None:
    from .measure import train

    try:
        model = make_model(job["entry"], Shape(**job["shape"]))
        return job["batch_size"] * job["length"] / train(model, corpus, job)[1]
    except Exception:  # it fails again in its own process, whose message goes into its row
        return None


def _seconds_apart(job: dict, output: Path) -> float:
    """Seconds of a job apart from the training steps: starting its process, and measuring."""
    start = time.perf_counter()
    result_file = output / ".trial.json"
    if _failure(job, output / ".trial-job.json", result_file) is None:
        result_file.unlink()
    return time.perf_counter() - start


def _run(job: dict, output: Path, number: int) -> dict:
    name = f"{number:02}-{job['seed']}"
    result_file = output / "results" / f"{name}.json"
    if not result_file.is_file():
        result_file.parent.mkdir(exist_ok=True)
        failure = _failure(job, output / "results" / f".{name}-job.json", result_file)
        if failure is not None:
            return {"entry": job["entry"], "seed": job["seed"], "error": failure}
    return json.loads(result_file.read_text(encoding="utf-8"))


def _failure(job: dict, job_file: Path, result_file: Path) -> str | None:
    """Run a job in a separate process; returns the error message, or None."""
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "hf_attn.comparison.measure", str(job_file), str(result_file)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    finally:
        job_file.unlink()
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit {done.returncode}"
