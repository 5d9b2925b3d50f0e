"""Functions that the commands share."""

import argparse


class CommandError(Exception):
    """A mistake of the user, reported by its message."""


def formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


def positive(text: str) -> int:
    """A whole number of at least 1, for `type=` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
