"""The `hf-attn` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .catalog import PAPERS, Paper


class CommandError(Exception):
    """A mistake of the user; the message is what they read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; 2 for a mistake of the user, which is told in one line on stderr; 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (CommandError, ValueError, OSError) as error:
        print(f"hf-attn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-attn",
        description="Attention research as Hugging Face components.",
        epilog="`hf-attn COMMAND --help` explains a command.",
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    papers = commands.add_parser(
        "papers",
        help="list the papers and what each has become",
        description="List the papers of the catalogue: what each has become, and whether it can be used yet.",
        formatter_class=_formatter,
    )
    papers.add_argument("--json", action="store_true", help="everything that the catalogue holds, as JSON")
    papers.set_defaults(run=_papers)

    convert = commands.add_parser(
        "convert",
        help="turn an official checkpoint into a folder for from_pretrained and the Hub",
        description="Turn a checkpoint of a paper's official code into a folder that from_pretrained loads and that can be "
        "uploaded as it is: weights, configuration, stub and model card, and the image processor of an image classifier. "
        "Nothing in the checkpoint may be left over, and no parameter of the model may stay unfilled.",
        epilog="example: hf-attn convert sigmoid_attention gala.safetensors --config gala.json --output gala-85m",
        formatter_class=_formatter,
    )
    convert.add_argument("slug", metavar="SLUG", help="the paper, as `hf-attn papers` names it")
    convert.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help=".safetensors, .pth, .pt or .bin file, or a folder or index of shards",
    )
    convert.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="the official constructor arguments as a JSON or YAML file; config.json in a folder of shards if not given",
    )
    convert.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    convert.set_defaults(run=_convert)

    quickstart = commands.add_parser(
        "quickstart",
        help="make, distil, measure and save a small EchoAtt model",
        description="EchoAtt on SmolLM2-135M, end to end: measure how similar the attention of its layers is, let the "
        "similar ones share, distil, compare with the base model, save a folder for the Hub and load it back. What is "
        "there from an earlier run is used again.",
        formatter_class=_formatter,
    )
    quickstart.add_argument(
        "--steps", metavar="N", type=_positive, help="steps of the first stage of the distillation"
    )
    quickstart.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("outputs/quickstart"), help="folder to write (%(default)s)"
    )
    quickstart.set_defaults(run=_quickstart)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _papers(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([_facts(paper) for paper in PAPERS.values()], indent=2))
        return
    rows = [("SLUG", "ARXIV", "STATUS", "BECOMES")]
    rows += [(paper.slug, paper.arxiv, paper.status, paper.becomes) for paper in PAPERS.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    available = sum(paper.available for paper in PAPERS.values())
    print(f"\n{available} of {len(PAPERS)} papers are available.")


def _facts(paper: Paper) -> dict:
    return {
        "slug": paper.slug,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "status": paper.status,
        "becomes": paper.becomes,
        "code": paper.code or None,
        "model_types": {
            family.model_type: {auto: family.model_reference(auto) for auto in family.models}
            for family in paper.families
        },
        "attention": list(paper.attention),
        "converts_official_checkpoints": paper.converter,
    }


def _convert(options: argparse.Namespace) -> None:
    _check_output(options.output, options.overwrite)
    config = _read_config(options.config) if options.config else None

    from transformers import PreTrainedModel

    from .conversion import from_official
    from .hub import write_model_card
    from .imaging import ImagePreprocessingMixin, image_processor_for

    model = from_official(options.slug, options.checkpoint, config)
    if not isinstance(model, PreTrainedModel):
        raise CommandError(
            f"{options.checkpoint.name} holds a {type(model).__name__}, which is a part of a model and has no folder of its "
            "own. Load it in Python with hf_attn.from_official."
        )
    processor = None
    if isinstance(model.config, ImagePreprocessingMixin):
        try:
            processor = image_processor_for(model.config)
        except ImportError as error:
            raise CommandError(str(error)) from error
    for pattern in ("model*.safetensors*", "preprocessor_config.json"):
        for stale in options.output.glob(pattern):
            stale.unlink()
    model.save_pretrained(options.output)
    if processor is not None:
        processor.save_pretrained(options.output)
    write_model_card(options.output, model)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters is in {options.output}.")
    print(f"Upload it with `hf upload USER/NAME {options.output}`.")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CommandError(f"--output {output} is not empty; name another folder, or pass --overwrite.")


def _read_config(path: Path) -> dict:
    import yaml

    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        config = read(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CommandError(f"--config {path} must hold a mapping of argument names to values.")
    return config


def _quickstart(options: argparse.Namespace) -> None:
    from .assets import AssetError
    from .output_folder import OutputFolderError
    from .quickstart import quickstart

    arguments = {} if options.steps is None else {"steps": options.steps}
    try:
        quickstart(options.output, **arguments)
    except (AssetError, ImportError, OutputFolderError) as error:
        raise CommandError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
