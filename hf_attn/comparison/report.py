"""The table, the files and the two plots of a comparison."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

from ..analysis.figures import new_figure
from ..training.writing import written_whole


#: column -> (heading, format)
COLUMNS = {
    "parameters": ("parameters", "{:,.0f}"),
    "parameters_ratio": ("vs. baseline", "{:.2f}"),
    "loss_1x": ("held-out loss", "{:.3f}"),
    "loss_spread": ("spread", "{:.3f}"),
    "perplexity_1x": ("ppl 1x", "{:.1f}"),
    "perplexity_2x": ("ppl 2x", "{:.1f}"),
    "perplexity_4x": ("ppl 4x", "{:.1f}"),
    "recall_1x": ("recall 1x", "{:.2f}"),
    "recall_2x": ("recall 2x", "{:.2f}"),
    "copying_1x": ("copy 1x", "{:.2f}"),
    "copying_2x": ("copy 2x", "{:.2f}"),
    "training_tokens_a_second": ("train tok/s", "{:,.0f}"),
    "decode_tokens_a_second": ("decode tok/s", "{:,.0f}"),
    "cache_bytes_a_token": ("cache B/token", "{:,.0f}"),
    "peak_memory": ("peak MiB", "{:,.0f}"),
}


def summarize(results: list[dict], baseline: str) -> list[dict]:
    """One row per entry: means over seeds, the spread of the held-out loss, and the error of an entry that failed."""
    rows = []
    for entry in dict.fromkeys(result["entry"] for result in results):
        runs = [result for result in results if result["entry"] == entry]
        failed = [run["error"] for run in runs if "error" in run]
        whole = [run for run in runs if "error" not in run]
        row: dict = {"entry": entry, "seeds": len(whole), "error": failed[0] if failed else ""}
        for name in COLUMNS:
            values = [run[name] for run in whole if run.get(name) is not None]
            if values:
                row[name] = mean(values)
        if whole:
            if "peak_memory" in row:
                row["peak_memory"] /= 2**20
            row["loss_spread"] = stdev(run["loss_1x"] for run in whole) if len(whole) > 1 else 0.0
        rows.append(row)
    of_baseline = next((row["parameters"] for row in rows if row["entry"] == baseline and "parameters" in row), None)
    for row in rows:
        if of_baseline and "parameters" in row:
            row["parameters_ratio"] = row["parameters"] / of_baseline
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the row of a failed entry contains the error instead of numbers."""
    lines = [
        "| " + " | ".join(["entry", *(heading for heading, _ in COLUMNS.values())]) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, (_, form) in COLUMNS.items()]
        if row["error"] and not row["seeds"]:
            cells[0] = f"failed: {row['error']}"
        lines.append("| " + " | ".join([f"`{row['entry']}`", *cells]) + " |")
    return "\n".join(lines)


def write_report(results: list[dict], folder: Path, baseline: str, steps: int) -> None:
    """Print the table, and write `comparison.md`, `.csv`, `.json`, `losses.png` and `quality.png`."""
    rows = summarize(results, baseline)
    text = table(rows)
    print(f"\n{steps} steps each\n\n{text}")
    with written_whole(folder / "comparison.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    with written_whole(folder / "comparison.json") as part:
        part.write_text(json.dumps({"steps": steps, "rows": rows, "results": results}), encoding="utf-8")
    with written_whole(folder / "comparison.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["entry", "seeds", *COLUMNS, "error"])
        writer.writeheader()
        writer.writerows(rows)
    _plot_losses(results, folder / "losses.png")
    _plot_quality(rows, folder / "quality.png")


def _smoothed(losses: list[float]) -> list[float]:
    width = max(1, len(losses) // 40)
    return [mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]


def _plot_losses(results: list[dict], path: Path) -> None:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    entries = list(dict.fromkeys(result["entry"] for result in results if "losses" in result))
    for number, entry in enumerate(entries):
        for seed, run in enumerate(run for run in results if run["entry"] == entry and "losses" in run):
            # ten colours: the next entries take them again with another line
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
            label = entry if seed == 0 else None
            axes.plot(_smoothed(run["losses"]), **style, label=label, linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (text and synthetic tasks)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_quality(rows: list[dict], path: Path) -> None:
    figure = new_figure(10, 4.5)
    costs = {
        "training_tokens_a_second": "training tokens per second",
        "decode_tokens_a_second": "decoded tokens per second",
    }
    both = figure.subplots(1, 2, sharey=True)
    for axes, (cost, label) in zip(both, costs.items(), strict=True):
        for number, row in enumerate(row for row in rows if "loss_1x" in row):
            # ten colours: the next entries take them again with another marker
            style = {"color": f"C{number % 10}", "fmt": "os^D"[number // 10 % 4]}
            axes.errorbar(row[cost], row["loss_1x"], yerr=row["loss_spread"], **style, label=row["entry"])
        axes.set_xlabel(f"{label} (higher is better)")
        axes.set_ylabel("held-out loss (lower is better)")
    both[-1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.savefig(path, dpi=120)
