"""`hf-attn compare`: the causal mechanisms under one budget."""

import argparse
from pathlib import Path

from ._command import CommandError, formatter, positive


def add_parser(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="train the causal families and a plain Llama with the same budget, and compare them",
        description="Train tiny language models on the same tokens with the same optimizer: a plain Llama and the "
        "causal families of the catalogue. Prints a table of quality and cost, and writes it as Markdown, "
        "CSV and JSON with two plots. The same command continues an interrupted comparison.",
        epilog="example: hf-attn compare --families llama echo_att 'echo_att:shared_layers=[1,2]' llama+sigmoid "
        "--minutes 5 --output outputs/compare",
        formatter_class=formatter,
    )
    compare.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help="models to compare: llama or a family, optionally followed by +ATTENTION_FUNCTION and by "
        ":FIELD=VALUE;... for its configuration (default: all)",
    )
    compare.add_argument("--minutes", type=float, default=20.0, metavar="N", help="approximate duration (%(default)s)")
    compare.add_argument(
        "--seeds", type=positive, default=2, metavar="N", help="training runs per model (%(default)s)"
    )
    compare.add_argument(
        "--data", metavar="FILE", help="text file, or Hub id of a dataset (default: Python's documentation)"
    )
    compare.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write")
    compare.add_argument(
        "--overwrite-output-dir",
        "--overwrite_output_dir",
        action="store_true",
        help="start a new comparison; an earlier one in this folder is kept under another name",
    )
    compare.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..comparison.run import compare
    from ..training.output_folder import OutputFolderError

    try:
        compare(
            options.output,
            options.families,
            options.minutes,
            options.seeds,
            options.data,
            overwrite=options.overwrite_output_dir,
        )
    except (ImportError, OutputFolderError) as error:
        raise CommandError(str(error)) from error
