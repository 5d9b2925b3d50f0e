"""`hf-attn claim`: what a paper claims, measured again."""

import argparse
from pathlib import Path

from ._command import CommandError, formatter


def add_parser(commands) -> None:
    claim = commands.add_parser(
        "claim",
        help="measure again what papers claim, in small",
        description="Run the small experiment behind the claim of a paper, some minutes each, and print its figures beside the "
        "stored ones. Writes a JSON file and a picture. The same command continues a run that was stopped.",
        epilog="example: hf-attn claim clear",
        formatter_class=formatter,
    )
    claim.add_argument("slugs", metavar="SLUG", nargs="*", help="papers, as `hf-attn papers` names them")
    claim.add_argument("--all", action="store_true", help="every claim that can be run")
    claim.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("outputs/claims"),
        help="folder to write, with a folder for each paper (%(default)s)",
    )
    claim.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("docs/results"), help="the stored results (%(default)s)"
    )
    claim.add_argument("--store", action="store_true", help="replace the stored results by the new ones")
    claim.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..claims.result import read_result
    from ..claims.run import claim_module, claims, run_claim, store

    if options.all == bool(options.slugs):
        raise CommandError(f"Name papers or give --all. Claims that can be run: {', '.join(claims())}.")
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
        print(f"\nLook at it: {folder / f'{slug}.png'}\n", flush=True)


def _report(record: dict, stored: dict | None) -> None:
    from ..claims.result import figures_of

    print(f"\n{record['claim']}\n\nnow:    {record['verdict']}. {record['why']}")
    if stored is not None:
        print(f"stored: {stored['verdict']}. {stored['why']} ({stored['date']}, {stored['machine']})")
    before = {(figure.name, figure.peer): figure for figure in figures_of(stored or {"figures": []})}
    for figure in figures_of(record):
        print(f"\nnow:    {figure}\nstored: {before.get((figure.name, figure.peer), '-')}")
