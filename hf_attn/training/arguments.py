"""Command lines of the scripts: shared arguments, and error messages of one line."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..architectures.ranges import Range
from .output_folder import CHECKPOINTS, OutputFolderError, output_folder


logger = logging.get_logger(__name__)

#: earlier names of arguments
RENAMED = {
    "--base": "--model_name_or_path",
    "--teacher": "--model_name_or_path",
    "--held_back": "--num_held_out",
    "--num_held_back": "--num_held_out",
    "--num_pictures": "--num_drawings",
}

_COUNT = Range(at_least=1)
_NOT_NEGATIVE = Range(at_least=0)

#: argument of any script -> its range
RANGES = {
    **dict.fromkeys(
        (
            "batch_size",
            "block_size",
            "cache_top_k",
            "checkpoint_steps",
            "discriminator_features",
            "down_factor",
            "eval_steps",
            "generation_batch_size",
            "capacity",
            "lora_layers",
            "num_held_out",
            "num_hidden_layers",
            "num_nodes",
            "gradient_accumulation_steps",
            "max_eval_samples",
            "max_new_tokens",
            "max_samples",
            "max_sequence_length",
            "max_train_samples",
            "mem_freq",
            "num_inference_steps",
            "num_planted",
            "num_rpn_layers",
            "num_samples",
            "part_size",
            "passkey_lengths",
            "passkey_trials",
            "per_device_eval_batch_size",
            "per_device_train_batch_size",
            "radius",
            "resolution",
            "scale",
            "similarity_samples",
            "teacher_steps",
            "validation_size",
            "vocab_size",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "cutmix_alpha",
            "guidance_scale",
            "learning_rate",
            "lora_rank",
            "loss_weights",
            "max_eval_side",
            "max_grad_norm",
            "max_minutes",
            "mixup_alpha",
            "num_overlays",
            "num_shared",
            "patch_size",
            "refinement_ratio",
            "sink_threshold",
            "warmup_steps",
            "weight_decay",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("ema_decay", "label_smoothing_factor", "passkey_depths"), Range(at_least=0, at_most=1)),
    # Trainer reads -1, and 0 as well, as "not given".
    "max_steps": Range(at_least=1, also=(-1,)),
    "num_train_epochs": Range(above=0),
    "perplexity_lengths": Range(at_least=2),
    "validation_split_percentage": Range(above=0, below=100),
}


def stop(command: str, message: object) -> SystemExit:
    """What ends a script with one line for its user."""
    return SystemExit(f"{command}: error: {' '.join(str(message).split())}")


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the list of all arguments, and suggests similar arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise stop(self.prog, f"{message} (--help lists the arguments)")

    def parse_known_args(self, args=None, namespace=None):
        # A misspelt name explains why another argument is missing, which argparse would report instead.
        names = [text for text in (sys.argv[1:] if args is None else args) if text.startswith("--") and len(text) > 2]
        unknown = [name for name in names if name.partition("=")[0] not in self._option_string_actions]
        if not unknown:
            namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise stop(self.prog, _unknown_argument(unknown, self._option_string_actions))
        return namespace, unknown


class _DataclassParser(Parser, HfArgumentParser):
    """A parser of dataclasses."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the commands in the description as they are."""


def parse_arguments(
    command: str,
    dataclass_types: type | Iterable[type],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[list[str]], dict[str, Any]] | None = None,
) -> tuple:
    """Parse a command line, or the JSON file that is the only one of its arguments, into dataclasses.

    Args:
        command: name of the script.
        dataclass_types: as for `HfArgumentParser`.
        arguments: `sys.argv[1:]` if not given.
        description: for `--help`.
        defaults: given the arguments, defaults in the place of those of the dataclasses.

    Returns:
        An instance of each dataclass.

    Raises:
        SystemExit: with one line for the user, if an argument is unknown or has a value that it cannot have.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        arguments = _from_json(command, Path(arguments[0]))
    parser = _DataclassParser(dataclass_types, prog=command, description=description, formatter_class=_HelpFormatter)
    if defaults is not None:
        parser.set_defaults(**defaults(arguments))
    try:
        parsed = parser.parse_args_into_dataclasses(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise stop(command, error) from error
    for group in parsed:
        _check_ranges(command, group)
    return parsed


def _from_json(command: str, path: Path) -> list[str]:
    """The fields of a JSON file as a command line; null leaves the default."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise stop(command, f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise stop(command, f"{path} must contain an object with argument names and values.")

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    arguments = []
    for name, value in given.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(text, value)]
        elif value is not None:
            arguments.append(f"--{name}={text(value)}")
    return arguments


def _unknown_argument(unknown: list[str], known: Iterable[str]) -> str:
    name = next((text for text in unknown if text.startswith("-")), unknown[0]).partition("=")[0]
    if name in RENAMED and RENAMED[name] in known:
        return f"{name} is now called {RENAMED[name]}."
    if not name.startswith("-"):
        return f"{name!r} does not belong to an argument (--help lists the arguments)."
    # Each argument is known with dashes and with underscores.
    close = difflib.get_close_matches(name.replace("-", "_"), [text.replace("-", "_") for text in known], n=1)
    if close:
        return f"there is no argument {name}; did you mean --{close[0].lstrip('_')}?"
    return f"there is no argument {name} (--help lists the arguments)."


def _check_ranges(command: str, group: Any) -> None:
    for name, value in vars(group).items():
        if name in RANGES and value is not None:
            try:
                RANGES[name].check(f"--{name}", value)
            except ValueError as error:
                raise stop(command, error) from error


def parse_overrides(command: str, overrides: Sequence[str], config_class: type[PreTrainedConfig]) -> dict[str, object]:
    """`["hidden_size=512", "depths=[1,2]", "hidden_act=gelu"]` as a dictionary; values are JSON, or else strings.

    Raises:
        SystemExit: for a name that is not a field of the configuration, which transformers would silently store.
    """
    known = [config_field.name for config_field in fields(config_class)]
    parsed = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise stop(command, f"--config_overrides takes name=value, got {override!r}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f". It has {', '.join(known)}."
            raise stop(command, f"{config_class.__name__} has no field {name!r}{hint}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@dataclass
class MachineArguments(TrainingArguments):
    """`TrainingArguments` for the devices that there are.

    Without an accelerator and without `use_cpu`, each of several processes would train a model of its own.
    """

    def __post_init__(self):
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()


@dataclass
class RunArguments(MachineArguments):
    """`TrainingArguments` of a script whose interrupted runs can be resumed."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint folder, or `last` for the last checkpoint in output_dir."}
    )


def prepare_run(command: str, training_args: RunArguments) -> None:
    """Train and evaluate unless --do_train or --do_eval is given, and resolve `--resume_from_checkpoint`.

    Raises:
        SystemExit: with one line for the user, see [`resolve_resume`].
    """
    if not (training_args.do_train or training_args.do_eval):
        training_args.do_train = training_args.do_eval = True
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    resolve_resume(command, training_args)


def resolve_resume(command: str, training_args: TrainingArguments) -> None:
    """Make a folder of `--resume_from_checkpoint last`, and see that there is one.

    Raises:
        SystemExit: with one line for the user, if there is no checkpoint, or if a new run is requested as well.
    """
    resume, output_dir = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if resume is None:
        return
    if training_args.overwrite_output_dir:
        raise stop(
            command,
            "--resume_from_checkpoint continues a run, but --overwrite_output_dir starts a new one; pass only one of "
            "them.",
        )
    if resume == "last":
        resume = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if resume is None:
            raise stop(command, f"there is no checkpoint in {output_dir} to resume from")
        training_args.resume_from_checkpoint = resume
    if not Path(resume).is_dir():
        raise stop(command, f"--resume_from_checkpoint {resume} is not a folder")


def settings_of(*groups: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments as JSON values, for the record of a run."""
    settings = {name: value for group in groups for name, value in asdict(group).items() if name not in without}
    return json.loads(json.dumps(settings, default=str))


#: arguments of transformers that the resulting weights depend on
_RESULT_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
)


def training_settings_of(training_args: TrainingArguments, *more: str) -> dict[str, Any]:
    """The training arguments that the resulting weights depend on, and `more`, for the record of a run."""
    return {name: getattr(training_args, name) for name in (*_RESULT_ARGUMENTS, *more)}


@contextmanager
def training_folder(
    command: str,
    training_args: TrainingArguments,
    settings: dict[str, Any],
    continues: bool = False,
    adds: bool = False,
    checkpoints: str = CHECKPOINTS,
) -> Iterator[None]:
    """Hold `output_dir` for the run of a script, in the first of its processes.

    Args:
        command: name of the script.
        training_args: with `overwrite_output_dir`.
        settings: see [`hf_attn.training.output_folder.claim_output_folder`].
        continues: whether the same settings continue a run; else `--resume_from_checkpoint` does.
        adds: whether the run only adds files of its own to what is in the folder.
        checkpoints: see [`hf_attn.training.output_folder.claim_output_folder`].

    Raises:
        SystemExit: with one line for the user, if the folder holds something else.
    """
    with ExitStack() as stack:
        try:
            with training_args.main_process_first(desc="output folder", local=False):
                if training_args.process_index == 0:
                    claimed = output_folder(
                        training_args.output_dir,
                        settings,
                        training_args.overwrite_output_dir,
                        command=command,
                        continues=continues,
                        resume=adds or (not continues and training_args.resume_from_checkpoint is not None),
                        checkpoints=checkpoints,
                    )
                    stack.enter_context(claimed)
        except OutputFolderError as error:
            raise stop(command, error) from error
        yield


def run_script(command: str, main: Callable[[], Any]) -> None:
    """Run a script as a command: mistakes in one line, and no process group left open.

    Details are logged with the verbosity `debug` (`TRANSFORMERS_VERBOSITY=debug`).
    """
    from accelerate import PartialState
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        main()
    except (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError) as error:
        logger.debug(f"{command} has stopped", exc_info=True)
        raise stop(command, str(error) or type(error).__name__) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    # A process that exits with its group open can abort.
    if PartialState._shared_state:
        PartialState().destroy_process_group()
