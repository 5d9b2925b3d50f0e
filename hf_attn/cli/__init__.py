"""The `hf-attn` command: one module a command, each with `add_parser`; what a command needs is imported when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import analyze_vit, check_gpu, claim, compare, convert, papers, plan, quickstart
from ._command import CommandError, formatter


#: in the order of `hf-attn --help`
COMMANDS = (papers, convert, quickstart, compare, claim, analyze_vit, plan, check_gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; 2 for a mistake of the user, which is told in one line on stderr; 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough (`hf-attn papers | head`). What is still in the buffer would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CommandError, ValueError, OSError) as error:
        print(f"hf-attn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-attn",
        description="Attention research as Hugging Face components.",
        epilog="`hf-attn COMMAND --help` explains a command.",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
