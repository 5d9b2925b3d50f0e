"""`hf-attn convert`: official checkpoints to folders for the Hub."""

import argparse
import json
from pathlib import Path

from ..training.output_folder import LOCK, locked
from ._command import CommandError, formatter


def add_parser(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert an official checkpoint to a folder for from_pretrained and the Hub",
        description="Convert a checkpoint of a paper's official code to a folder that from_pretrained loads and that "
        "can be uploaded to the Hub: weights, configuration, stub and model card, and the image processor "
        "of an image classifier. The conversion fails if a tensor of the checkpoint is unused or a "
        "parameter of the model has no value.",
        epilog="example: hf-attn convert sigmoid_attention gala.safetensors --config gala.json --output gala-85m",
        formatter_class=formatter,
    )
    convert.add_argument("slug", metavar="SLUG", help="the paper, by its name in `hf-attn papers`")
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
        help="JSON or YAML file with the official constructor arguments (default: config.json if the checkpoint is a "
        "folder)",
    )
    convert.add_argument(
        "--entry",
        metavar="NAME",
        help="entry with the weights in a file with several state dicts (default: averaged weights, if there are any)",
    )
    convert.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to write")
    convert.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model in a folder that is not empty",
    )
    convert.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    _check_output(options.output, options.overwrite, options.checkpoint)
    config = _read_config(options.config) if options.config else None

    with locked(options.output):
        _convert(options, config)


def _convert(options: argparse.Namespace, config: dict | None) -> None:
    from transformers import PreTrainedModel

    from ..architectures.imaging import ImagePreprocessingMixin, image_processor_for
    from ..checkpoints.official import from_official
    from ..hub import write_model_card
    from ..training.writing import files_written_whole

    model = from_official(options.slug, options.checkpoint, config, entry=options.entry)
    if not isinstance(model, PreTrainedModel):
        raise CommandError(
            f"{options.checkpoint.name} contains a {type(model).__name__}, which is only a part of a model and cannot "
            "be saved as one. Load it in Python with hf_attn.from_official."
        )
    processor = None
    if isinstance(model.config, ImagePreprocessingMixin):
        try:
            processor = image_processor_for(model.config)
        except ImportError as error:
            raise CommandError(str(error)) from error
    with files_written_whole(options.output) as part:
        model.save_pretrained(part)
        if processor is not None:
            processor.save_pretrained(part)
        write_model_card(part, model)
        written = {path.name for path in part.iterdir()}
    # Files of an earlier model would be loaded instead of, or together with, those of this one.
    for pattern in ("model*.safetensors*", "preprocessor_config.json"):
        for stale in options.output.glob(pattern):
            if stale.name not in written:
                stale.unlink()
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters was saved to {options.output}.")
    print(f"Upload it with `hf upload USER/NAME {options.output}`.")


def _check_output(output: Path, overwrite: bool, checkpoint: Path) -> None:
    source = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if output.is_dir() and output.resolve() == source.resolve():
        raise CommandError(f"--output {output} is the folder of the official checkpoint; choose another folder.")
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is a file; choose a folder.")
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()) and not overwrite:
        raise CommandError(f"--output {output} is not empty; choose another folder, or pass --overwrite.")


def _read_config(path: Path) -> dict:
    import yaml

    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        config = read(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CommandError(f"--config {path} must contain a mapping from argument names to values.")
    return config
