"""Official checkpoints -> families of this package, strictly: nothing is left over and nothing stays unfilled."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..catalog import PAPERS, get_paper
from .files import INDEX_SUFFIX, ConversionError, LazyTensors, open_checkpoint
from .quiet import quietly


#: names under which training code stores the weights in its files; the first that exists is taken, averages before the rest
STATE_DICT_ENTRIES = (
    "params_ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
    "params",
    "state_dict",
    "model",
)

#: prefixes added by wrappers of training code (data parallelism, `torch.compile`), and by transformers' bare models
_WRAPPERS = ("module.", "_orig_mod.")
_BASE_MODEL = "model."


@dataclass(frozen=True)
class Converted:
    """Result of a family's `convert_official`.

    Attributes:
        model_class: class to build.
        config: its configuration, or the keyword arguments of a plain module.
        state_dict: the weights under the names of `model_class`.
        dropped: official keys that hold nothing the model needs, each known by name to the converter.
    """

    model_class: type[nn.Module]
    config: Any
    state_dict: dict[str, torch.Tensor]
    dropped: tuple[str, ...] = ()


class StateDict(Mapping):
    """Read-only official state dict that remembers which keys a converter has taken."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._tensors:
            raise ConversionError(f"The checkpoint has no {key!r}, which the converter needs.")
        self.taken.add(key)
        return self._tensors[key]

    def __contains__(self, key) -> bool:
        return key in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def left_over(self) -> list[str]:
        return sorted(set(self._tensors) - self.taken)


class OfficialArguments(Mapping):
    """Official constructor arguments, with a record of those that a converter has read.

    One that is needed and not there is a [`ConversionError`], and so is one that nobody has read: it is misspelt,
    or it changes the model in a way that is not supported.
    """

    def __init__(self, arguments: Mapping[str, Any]):
        self._arguments = dict(arguments)
        self._known: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._known.add(name)
        if name not in self._arguments:
            raise ConversionError(
                f"The official configuration has no {name!r}, which the converter needs. It has "
                f"{', '.join(map(str, self._arguments)) or 'nothing'}."
            )
        return self._arguments[name]

    def __contains__(self, name) -> bool:
        self._known.add(name)
        return name in self._arguments

    def get(self, name: str, default: Any = None) -> Any:
        return self._arguments[name] if name in self else default

    def __iter__(self):
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def agree(self, **found: Any) -> None:
        """Check arguments that follow from the weights: they are optional, but must agree with the weights."""
        for name, value in found.items():
            given = self.get(name, value)
            if (list(given) if isinstance(given, tuple) else given) != value:
                raise ConversionError(f"The weights are those of {name}={value}, but the configuration says {given}.")

    def leave(self, *names: str) -> None:
        """Ignore arguments that have no effect on the outputs in eval mode."""
        self._known.update(names)

    def leave_rest(self) -> None:
        """Accept every other argument: the configuration is that of a larger model, or describes a whole training."""
        self._known.update(self._arguments)

    def check(self, slug: str) -> None:
        """Raise [`ConversionError`] for arguments that were not read."""
        unread = sorted(set(self._arguments) - self._known, key=str)
        if not unread:
            return
        similar = [match for name in unread for match in get_close_matches(str(name), self._known, n=1, cutoff=0.75)]
        advice = f" Did you mean {_names(similar)}?" if similar else f" Supported: {_names(self._known, limit=40)}."
        raise ConversionError(
            f"The official configuration has {_names(unread)}, which the converter of {slug} does not support.{advice}"
        )


def _names(keys: Iterable[str], limit: int = 12) -> str:
    keys = sorted(map(str, keys))
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values())


def select_state_dict(
    checkpoint: Mapping[str, Any], source: str = "The checkpoint", entry: str | None = None
) -> dict[str, torch.Tensor]:
    """Find the state dict in a checkpoint of training code: the weights, or a dictionary that contains them.

    Of a dictionary the first entry of [`STATE_DICT_ENTRIES`] is taken, averaged weights before others, or the only
    one that is a dictionary of tensors; the rest (optimizer, epoch, arguments) belongs to the training. In a state dict
    itself plain values such as an epoch counter are not weights and are ignored. What wrappers put before every name
    (`module.`, `_orig_mod.`) is removed.

    Args:
        checkpoint: what [`~hf_attn.checkpoints.files.read_checkpoint`] or `torch.load` returned.
        source: what it is, for error messages.
        entry: name of the entry to take.

    Raises:
        ConversionError: if there are no tensors, no such entry, or several dictionaries of tensors of which none has a
            known name.
    """
    nested = [name for name, value in checkpoint.items() if _holds_tensors(value)]
    if entry is not None and entry not in nested:
        raise ConversionError(
            f"{source} has no entry {entry!r} with weights. Entries with tensors: {_names(nested) or 'none'}."
        )
    chosen = [entry] if entry is not None else [name for name in STATE_DICT_ENTRIES if name in nested]
    if not chosen and len(nested) == 1 and not _holds_tensors(checkpoint):
        chosen = nested
    if chosen:
        checkpoint = checkpoint[chosen[0]]
    elif nested:
        raise ConversionError(
            f"{source} contains several dictionaries of tensors, and it is unclear which one has the weights: "
            f"{_names(nested)}{', and its top-level entries' if _holds_tensors(checkpoint) else ''}. Choose one with "
            "`entry`."
        )
    plain = (bool, int, float, str, bytes, type(None))
    tensors = {name: value for name, value in checkpoint.items() if not isinstance(value, plain)}
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if not tensors or others:
        problem = f"{_names(others)}, which are not tensors" if others else "no tensors"
        raise ConversionError(f"{source} is not a state dict: it contains {problem}.")
    while prefix := next((wrapper for wrapper in _WRAPPERS if _all_begin_with(wrapper, tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _all_begin_with(prefix: str, names: Iterable[str]) -> bool:
    return all(str(name).startswith(prefix) for name in names)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with storage of its own: a view of a fused weight would keep the whole weight in memory."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load_strict(
    model_class: type[nn.Module], config: Any, state_dict: dict[str, torch.Tensor], source: str
) -> nn.Module:
    """Build a model and fill it with exactly these weights.

    Args:
        model_class: a transformers model class, or a plain module class.
        config: its configuration, or the keyword arguments of a plain module.
        state_dict: its weights.
        source: what the weights are, for error messages.

    Returns:
        The model in eval mode.

    Raises:
        ConversionError: naming the keys that are missing, left over or of another shape.
    """
    state_dict = {name: _own(tensor) for name, tensor in state_dict.items()}
    if isinstance(config, dict):
        model = model_class(**config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        missing, unexpected = shapes.keys() - state_dict.keys(), state_dict.keys() - shapes.keys()
        mismatched = [
            (name, tensor.shape, shapes[name])
            for name, tensor in state_dict.items()
            if name in shapes and tensor.shape != shapes[name]
        ]
        if not (missing or unexpected or mismatched):
            model.load_state_dict(state_dict)
    else:
        with quietly():
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state_dict, ignore_mismatched_sizes=True, output_loading_info=True
            )
        model.config.name_or_path = ""  # transformers notes the checkpoint that it was not given
        missing, unexpected, mismatched = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    problems = []
    if missing:
        problems.append(f"no weights for {_names(missing)}")
    if unexpected:
        problems.append(f"no place for {_names(unexpected)}")
    if mismatched:
        shapes = [f"{name} ({list(found)} instead of {list(wanted)})" for name, found, wanted in mismatched]
        problems.append(f"other shapes: {_names(shapes)}")
    if problems:
        raise ConversionError(f"{source} does not fit {model_class.__name__}: {'; '.join(problems)}.")
    return model.eval()


def _config_beside(path: Path) -> dict[str, Any]:
    """`config.json` in a folder, or beside an index of shards; empty if there is none."""
    file = (path.parent if path.name.endswith(INDEX_SUFFIX) else path) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file} must contain a mapping from argument names to values.")
    return config


def from_official(
    slug: str,
    state_dict_or_path: Mapping[str, torch.Tensor] | str | Path,
    config: dict[str, Any] | None = None,
    entry: str | None = None,
) -> nn.Module:
    """Turn a checkpoint of a paper's official code into a model of this package.

    Args:
        slug: the paper, as in the catalogue.
        state_dict_or_path: official state dict, or a `.safetensors` or PyTorch file. A dictionary that holds the state
            dict among other things will do, see [`select_state_dict`]. Of a checkpoint in shards the folder or the
            index (`*.index.json`); only the tensors that are needed are read, and files without any need not be there.
        config: official constructor arguments, or the official configuration file's; families that can read them off
            the shapes of the weights need none. If it is not given, `config.json` in the folder of shards is
            read.
        entry: which entry of a dictionary around several state dicts holds the weights, such as `model` where there is
            a `model_ema` too. If it is not given, averaged weights are taken first.

    Returns:
        The model in eval mode.

    Raises:
        ConversionError: if any official key is left over, any parameter is not filled or any shape differs; the message
            names them.
        ValueError: if the paper has no converter.
    """
    paper = get_paper(slug)
    if not paper.converter:
        known = ", ".join(paper.slug for paper in PAPERS.values() if paper.converter)
        raise ValueError(f"{slug} has no converter for official checkpoints. Papers that have one: {known}.")
    if isinstance(state_dict_or_path, str | Path):
        source = Path(state_dict_or_path).absolute().name
        tensors = open_checkpoint(state_dict_or_path)
        if not isinstance(tensors, LazyTensors):
            tensors = select_state_dict(tensors, source, entry)
        if config is None:
            config = _config_beside(Path(state_dict_or_path))
    else:
        source = "The state dict"
        # The parameters of the model are the tensors themselves, and those of the caller are the caller's.
        tensors = select_state_dict(state_dict_or_path, source, entry)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        return _convert(slug, paper.converter_module, tensors, config or {}, source)
    except ConversionError as error:
        if not _all_begin_with(_BASE_MODEL, tensors):
            raise
        # A model saved from within a custom wrapper; official layouts with this prefix have been converted above.
        unwrapped = {name.removeprefix(_BASE_MODEL): tensors[name] for name in tensors}
        try:
            return _convert(slug, paper.converter_module, unwrapped, config or {}, source)
        except ConversionError:
            raise ConversionError(
                f"{error} (All names begin with {_BASE_MODEL!r}. Removing this prefix did not help.)"
            ) from error


#: what Python and torch raise for sizes and names that make no model
_IMPOSSIBLE_VALUES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _convert(
    slug: str, converter_module: str, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], source: str
) -> nn.Module:
    converter = import_module(converter_module)
    official, arguments = StateDict(tensors), OfficialArguments(config)
    try:
        converted = converter.convert_official(official, arguments)
        arguments.check(slug)
        left_over = set(official.left_over) - set(converted.dropped)
        if left_over:
            raise ConversionError(f"{source} has keys that {slug} does not use: {_names(left_over)}.")
        return load_strict(converted.model_class, converted.config, converted.state_dict, source)
    except ConversionError:
        raise
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"No {slug} model can be built from the official configuration: {reason}") from error
    except _IMPOSSIBLE_VALUES as error:
        if not config:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in config.items())
        raise ConversionError(
            f"No {slug} model can be built from the official configuration ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). It is {given}."
        ) from error
