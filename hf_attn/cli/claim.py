"""`hf-attn claim`: what a paper claims, measured again."""

import argparse
from pathlib import Path

from ._command import CommandError, formatter


def add_parser(commands) -> None:
    claim = commands.add_parser(
        "claim",
        help="repeat the small experiments behind the papers' claims",
        description="Run the small experiment behind the claim of a paper (some minutes each), and print its results "
        "next to the stored ones. Writes a JSON file and a figure. The same command continues an "
        "interrupted run.",
        epilog="example: hf-attn claim clear",
        formatter_class=formatter,
    )
    claim.add_argument("slugs", metavar="SLUG", nargs="*", help="papers, by their names in `hf-attn papers`")
    claim.add_argument("--all", action="store_true", help="run all claims that have an experiment")
    claim.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("outputs/claims"),
        help="output folder, with a sub-folder per paper (%(default)s)",
    )
    claim.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("docs/results"),
        help="folder of the stored results (%(default)s)",
    )
    claim.add_argument("--store", action="store_true", help="replace the stored results by the new ones")
    claim.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..claims.result import read_result
    from ..claims.run import claim_module, claims, run_claim, store

    if options.all == bool(options.slugs):
        raise CommandError(f"Name papers, or use --all. Papers with an experiment: {', '.join(claims())}.")
    slugs = claims() if options.all else dict.fromkeys(options.slugs)
    # Before the work, not after it.
    stored = {slug: read_result(options.results, slug) for slug in slugs}
    for slug in slugs:
        claim_module(slug)
    for slug in slugs:
        print(f"{slug}", flush=True)
        folder = options.output / slug
        try:
            record = run_claim(slug, folder)
        except ImportError as error:
            raise CommandError(f"{error} The claims need: pip install 'hf_attn[all]' timm") from error
        if options.store:
            store(slug, folder, options.results)
        _report(record, stored[slug])
        print(f"\nFigure: {folder / f'{slug}.png'}\n", flush=True)


def _report(record: dict, stored: dict | None) -> None:
    from ..claims.result import figures_of

    print(f"\n{record['claim']}\n\nnow:    {record['verdict']}. {record['why']}")
    if stored is not None:
        print(f"stored: {stored['verdict']}. {stored['why']} ({stored['date']}, {stored['machine']})")
    before = {(figure.name, figure.peer): figure for figure in figures_of(stored or {"figures": []})}
    for figure in figures_of(record):
        print(f"\nnow:    {figure}\nstored: {before.get((figure.name, figure.peer), '-')}")
