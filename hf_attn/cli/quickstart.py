"""`hf-attn quickstart`: one paper end to end."""

import argparse
from pathlib import Path

from ._command import CommandError, formatter, positive


def add_parser(commands) -> None:
    quickstart = commands.add_parser(
        "quickstart",
        help="make, distil, measure and save a small EchoAtt model",
        description="EchoAtt on SmolLM2-135M, end to end: measure how similar the attention of its layers is, let the "
        "similar ones share, distil, compare with the base model, save a folder for the Hub and load it back. What is "
        "there from an earlier run is used again.",
        formatter_class=formatter,
    )
    quickstart.add_argument("--steps", metavar="N", type=positive, help="steps of the first stage of the distillation")
    quickstart.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("outputs/quickstart"), help="folder to write (%(default)s)"
    )
    quickstart.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..examples.assets import AssetError
    from ..examples.quickstart import quickstart
    from ..training.output_folder import OutputFolderError

    arguments = {} if options.steps is None else {"steps": options.steps}
    try:
        quickstart(options.output, **arguments)
    except (AssetError, ImportError, OutputFolderError) as error:
        raise CommandError(str(error)) from error
