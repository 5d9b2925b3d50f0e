"""Run golden cases: `python -m tests.goldens [FOLDER ...]`.

A folder is a case, or contains cases at any depth; by default, all cases of the repository are run. Prints one line per case
and exits with a non-zero code if a case fails, cannot be run or compares nothing.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from .case import find_cases
from .runner import run_case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__.split("\n\n")[1])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(__file__).parent], metavar="FOLDER")
    try:
        cases = find_cases(*parser.parse_args(arguments).folders)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for case in cases:
        result = run_case(case)
        failed += not result.passed
        print(result, flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases passed")
    return 1 if failed else 0


if __name__ == "__main__":
    logging.disable_progress_bar()
    sys.exit(main())
