"""Official checkpoints -> families of this package, strictly: nothing is left over and nothing stays unfilled."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..catalog import PAPERS, get_paper
from .files import INDEX_SUFFIX, ConversionError, LazyTensors, open_checkpoint


#: names under which training code keeps the weights in its files; the first that is there is taken, averages before the rest
STATE_DICT_ENTRIES = ("params_ema", "params", "state_dict", "model")


@dataclass(frozen=True)
class Converted:
    """What a family's ``convert_official`` returns.

    Attributes:
        model_class: class to build.
        config: its configuration, or the keyword arguments of a plain module.
        state_dict: the weights under the names of ``model_class``.
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


class OfficialArguments(dict):
    """Official constructor arguments; one that is needed and not there is a :class:`ConversionError`."""

    def __missing__(self, key: str):
        raise ConversionError(
            f"The official configuration has no {key!r}, which the converter needs; it has "
            f"{', '.join(map(str, self)) or 'nothing'}."
        )


def _names(keys: Iterable[str], limit: int = 12) -> str:
    keys = sorted(map(str, keys))
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values())


def select_state_dict(checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> dict[str, torch.Tensor]:
    """Find the state dict in what training code saves: the weights, or a dictionary around them.

    Of a dictionary the entry named ``params_ema``, ``params``, ``state_dict`` or ``model`` is taken, in this order, or the
    only one that is a dictionary of tensors; the rest (optimizer, epoch, arguments) belongs to the training. In a state
    dict itself plain values such as an epoch counter are no weights and are ignored.

    Args:
        checkpoint: what :func:`~hf_attn.checkpoints.files.read_checkpoint` or ``torch.load`` returned.
        source: what it is, for error messages.

    Raises:
        ConversionError: if there are no tensors, or several dictionaries of tensors of which none has such a name.
    """
    nested = [name for name, value in checkpoint.items() if _holds_tensors(value)]
    chosen = [name for name in STATE_DICT_ENTRIES if name in nested]
    if not chosen and len(nested) == 1 and not _holds_tensors(checkpoint):
        chosen = nested
    if chosen:
        checkpoint = checkpoint[chosen[0]]
    elif nested:
        raise ConversionError(
            f"{source} holds several dictionaries of tensors, and it is unclear which are the weights: {_names(nested)}"
            f"{' and its own entries' if _holds_tensors(checkpoint) else ''}. Pass the right one as a state dict."
        )
    plain = (bool, int, float, str, bytes, type(None))
    tensors = {name: value for name, value in checkpoint.items() if not isinstance(value, plain)}
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if not tensors or others:
        problem = f"{_names(others)}, which are no tensors" if others else "no tensors"
        raise ConversionError(f"{source} is no state dict: it holds {problem}.")
    return tensors


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what it was cut from: a view of a fused weight would keep all of it in memory."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and report on keys; our own error says what does not fit."""
    from transformers.utils import logging

    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()


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
        with _quietly():
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state_dict, ignore_mismatched_sizes=True, output_loading_info=True
            )
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
    """``config.json`` in a folder, or beside an index of shards; empty if there is none."""
    file = (path.parent if path.name.endswith(INDEX_SUFFIX) else path) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file} must hold a mapping of argument names to values.")
    return config


def from_official(
    slug: str,
    state_dict_or_path: Mapping[str, torch.Tensor] | str | Path,
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """Turn a checkpoint of a paper's official code into a model of this package.

    Args:
        slug: the paper, as in the catalogue.
        state_dict_or_path: official state dict, or a ``.safetensors`` or PyTorch file. A dictionary that holds the state
            dict among other things will do, see :func:`select_state_dict`. Of a checkpoint in shards the folder or the
            index (``*.index.json``); only the tensors that are needed are read, and files without any need not be there.
        config: official constructor arguments, or the official configuration file's; families that can read them off
            the shapes of the weights need none. If it is not given, ``config.json`` in the folder of shards is
            read.

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
            tensors = select_state_dict(tensors, source)
        if config is None:
            config = _config_beside(Path(state_dict_or_path))
    else:
        source = "The state dict"
        # The parameters of the model are the tensors themselves, and those of the caller are the caller's.
        tensors = {name: tensor.clone() for name, tensor in select_state_dict(state_dict_or_path, source).items()}
    official = StateDict(tensors)
    converter = import_module(paper.converter_module)
    try:
        converted = converter.convert_official(official, OfficialArguments(config or {}))
    except StrictDataclassError as error:
        raise ConversionError(f"The official configuration does not make a {slug} model: {error}") from error
    left_over = set(official.left_over) - set(converted.dropped)
    if left_over:
        raise ConversionError(f"{source} has keys that {slug} does not know: {_names(left_over)}.")
    return load_strict(converted.model_class, converted.config, converted.state_dict, source)
