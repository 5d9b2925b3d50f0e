"""Time to import hf_attn relative to transformers' Auto classes, each in a new process.

    python scripts/benchmarks/import_time.py --json import_time.json

Times are medians of processes started in turns, without the start of the interpreter. The mark is 1.15 times the import
of `AutoConfig` and `AutoModelForCausalLM`.
"""

import argparse
import statistics
import sys
from pathlib import Path

from _common import print_table, run_fresh, write_json


MARK = 1.15
AUTO_CLASSES = "from transformers import AutoConfig, AutoModelForCausalLM"

#: name -> code that is timed
STATEMENTS = {
    "Auto classes": AUTO_CLASSES,
    "hf_attn": "import hf_attn",
    "both": f"import hf_attn; {AUTO_CLASSES}",
}


def measure(name: str) -> dict[str, float]:
    """Run in the fresh process: seconds of a statement, on the clock and of the processor."""
    import time

    namespace = {}
    code = compile(STATEMENTS[name], "<statement>", "exec")
    clock, processor = time.perf_counter(), time.process_time()
    exec(code, namespace)
    return {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="processes per statement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="output file")
    parser.add_argument("--measure", choices=STATEMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        import json

        print(json.dumps(measure(arguments.measure)))
        return

    runs = {name: [] for name in STATEMENTS}
    for repeat in range(arguments.repeats + 1):
        for name, results in runs.items():
            result = run_fresh(__file__, "--measure", name)
            if repeat > 0:  # the first fills the file cache
                results.append(result)
        print(f"\rround {repeat} of {arguments.repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in runs.items()
    }
    base = medians["Auto classes"]
    rows = [
        {
            "import": name,
            "seconds": median["seconds"],
            "ratio": median["seconds"] / base["seconds"],
            "processor seconds": median["processor_seconds"],
            "processor ratio": median["processor_seconds"] / base["processor_seconds"],
        }
        for name, median in medians.items()
    ]
    print_table(rows)
    worst = max(row["ratio"] for row in rows)
    print(f"largest ratio {worst:.3f}, mark {MARK}: {'reached' if worst <= MARK else 'missed'}")
    write_json(arguments.json, {"benchmark": "import_time", "mark": MARK, "ratio": worst, "rows": rows})


if __name__ == "__main__":
    main()
