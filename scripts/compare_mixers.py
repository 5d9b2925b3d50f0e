#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Quality and cost of token mixers against the length of the sequence (arXiv 2302.06218).

Trains one small model per mixer and length on two tasks:

- `recall`, associative recall at a growing distance: pairs of a key and a value, each a token, then filler, then one of the keys; the model
  names its value. It is a classifier, so all mixers can be compared.
- `text`, the next byte of the documentation that comes with Python; causal mixers only.

    python scripts/compare_mixers.py --output_dir mixers
    python scripts/compare_mixers.py --output_dir mixers_text --tasks text --lengths 128 512

Prints accuracy (`recall`) or bits per byte on held-out text (`text`) with the time of a training step, and writes `results.csv` and
`results.png`. A run that was interrupted is continued by the same command.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from hf_attn import TokenMixerConfig, TokenMixerForCausalLM, TokenMixerForSequenceClassification
from hf_attn.analysis.figures import new_figure
from hf_attn.mixers import MIXERS, causal_mixers
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "compare_mixers.py"
TASKS = {"recall": "accuracy", "text": "bits per byte"}
COLUMNS = ("task", "mixer", "length", "quality", "step_ms", "parameters")
KEYS, VALUES, PAIRS = 8, 8, 4
#: a token for each pair of a key and a value, one for each key alone, filler, padding
FILLER = KEYS * VALUES + KEYS
EVALUATION_BATCHES = 8


def recall_batch(length: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Pairs at the beginning, filler, and a key at the end; the label is the value of that key."""
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (size, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (size, 1), generator=generator)
    input_ids = torch.full((size, length), FILLER)
    input_ids[:, :PAIRS] = keys * VALUES + values
    input_ids[:, -1:] = KEYS * VALUES + keys.gather(1, asked)
    return {"input_ids": input_ids, "labels": values.gather(1, asked)[:, 0]}


class Text:
    """Bytes of Python's help topics, the last tenth held out."""

    def __init__(self):
        from pydoc_data.topics import topics

        data = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))
        self.train, self.held_out = data.split([len(data) - len(data) // 10, len(data) // 10])

    def batch(self, length: int, size: int, generator: torch.Generator, held_out: bool) -> dict[str, torch.Tensor]:
        data = self.held_out if held_out else self.train
        starts = torch.randint(len(data) - length, (size, 1), generator=generator)
        input_ids = data[starts + torch.arange(length)]
        return {"input_ids": input_ids, "labels": input_ids}


def make_model(task: str, mixer: str, length: int, options: argparse.Namespace):
    causal = task == "text"
    sizes = {
        "hidden_size": options.hidden_size,
        "intermediate_size": 2 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "max_position_embeddings": length,
    }
    vocabulary = {"vocab_size": 256} if causal else {"vocab_size": FILLER + 2, "num_labels": VALUES}
    # No token is padding, but a classifier needs a padding id.
    padding = {} if causal else {"pad_token_id": FILLER + 1}
    config = TokenMixerConfig(mixer=mixer, causal=causal, **sizes, **vocabulary, **padding)
    return (TokenMixerForCausalLM if causal else TokenMixerForSequenceClassification)(config)


def run(task: str, mixer: str, length: int, options: argparse.Namespace) -> dict[str, object]:
    """Train and evaluate one model."""
    set_seed(options.seed)
    model = make_model(task, mixer, length, options)
    generator = torch.Generator().manual_seed(options.seed)
    text = Text() if task == "text" else None

    def batch(held_out: bool) -> dict[str, torch.Tensor]:
        if text is None:
            return recall_batch(length, options.batch_size, generator)
        return text.batch(length, options.batch_size, generator, held_out)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    seconds = []
    model.train()
    for _ in tqdm(range(options.steps), desc=f"{task} {mixer} {length}", leave=False):
        inputs = batch(held_out=False)
        start = time.perf_counter()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    model.eval()
    scores = []
    with torch.no_grad():
        for _ in range(EVALUATION_BATCHES):
            inputs = batch(held_out=True)
            outputs = model(**inputs)
            if task == "text":
                scores.append(outputs.loss.item() / torch.tensor(2.0).log().item())
            else:
                scores.append((outputs.logits.argmax(-1) == inputs["labels"]).float().mean().item())
    found = (task, mixer, length, statistics.fmean(scores), 1000 * statistics.median(seconds), model.num_parameters())
    return dict(zip(COLUMNS, found, strict=True))


def read_results(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    kinds = dict(zip(COLUMNS, (str, str, int, float, float, int), strict=True))
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: kinds[name](value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_results(path: Path, rows: list[dict[str, object]]) -> None:
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def print_results(rows: list[dict[str, object]]) -> None:
    for task in dict.fromkeys(row["task"] for row in rows):
        lengths = sorted({row["length"] for row in rows if row["task"] == task})
        print(f"{task}: {TASKS[task]} (ms per training step)")
        print("".join([f"{'mixer':<20}", *(f"{length:>18}" for length in lengths)]))
        for mixer in MIXERS:
            found = {row["length"]: row for row in rows if (row["task"], row["mixer"]) == (task, mixer)}
            cells = [f"{found[n]['quality']:.3f} ({found[n]['step_ms']:.0f})" if n in found else "-" for n in lengths]
            if found:
                print("".join([f"{mixer:<20}", *(f"{cell:>18}" for cell in cells)]))


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """A row of panels a task: quality and time of a step against the length."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(11, 4 * len(tasks))
    for index, task in enumerate(tasks):
        for column, (value, label) in enumerate((("quality", TASKS[task]), ("step_ms", "ms per training step"))):
            axes = figure.add_subplot(len(tasks), 2, 2 * index + column + 1)
            for number, mixer in enumerate(MIXERS):
                points = sorted((r["length"], r[value]) for r in rows if (r["task"], r["mixer"]) == (task, mixer))
                if points:
                    style = ("-", "--")[number // 10]
                    axes.plot(
                        *zip(*points, strict=True), marker="o", linestyle=style, color=f"C{number % 10}", label=mixer
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("linear" if value == "quality" else "log")
            axes.set_title(task)
            axes.set_xlabel("tokens")
            axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="start a new run; an earlier run is kept under another name",
    )
    options = parser.parse_args(arguments)
    if min(options.lengths) <= PAIRS:
        parser.error(f"--lengths must be at least {PAIRS + 1}: {PAIRS} pairs and a key")
    if min(options.steps, options.batch_size, options.hidden_size, options.layers) < 1:
        parser.error("--steps, --batch_size, --hidden_size and --layers must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    options = parse(arguments)
    names = ("steps", "batch_size", "hidden_size", "layers", "learning_rate", "seed")
    settings = {name: getattr(options, name) for name in names}
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME):
            return run_missing(options)
    except OutputFolderError as error:
        raise stop(NAME, error) from None


def run_missing(options: argparse.Namespace) -> list[dict[str, object]]:
    """Run the missing parts of the comparison; returns all its results."""
    path = options.output_dir / "results.csv"
    rows = read_results(path)
    finished = {(row["task"], row["mixer"], row["length"]) for row in rows}
    wanted = [
        (task, mixer, length)
        for task in options.tasks
        for length in sorted(set(options.lengths))
        for mixer in options.mixers
        if task != "text" or mixer in causal_mixers()
    ]
    for task, mixer, length in tqdm([job for job in wanted if job not in finished], desc="models"):
        rows.append(run(task, mixer, length, options))
        write_results(path, rows)
    print_results(rows)
    if rows:
        plot(rows, options.output_dir / "results.png")
    return rows


if __name__ == "__main__":
    run_script(NAME, main)
