"""Official checkpoints -> families of this package, strictly: nothing is left over and nothing stays unfilled."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .catalog import PAPERS, get_paper


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
        self._tensors = dict(tensors)
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


class ConversionError(ValueError):
    """A checkpoint does not fit: keys are left over, keys are missing, shapes differ, or the file cannot be read."""


class OfficialArguments(dict):
    """Official constructor arguments; one that is needed and not there is a :class:`ConversionError`."""

    def __missing__(self, key: str):
        raise ConversionError(
            f"The official configuration has no {key!r}, which the converter needs; it has "
            f"{', '.join(map(str, self)) or 'nothing'}."
        )


def _names(keys: Iterable[str], limit: int = 12) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a ``.safetensors`` or a PyTorch file (``.pth``, ``.pt``, ``.bin``) without running any code from it.

    Raises:
        ConversionError: if the file is corrupt, truncated or of another kind, or if its pickle needs more than tensors
            and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no checkpoint file at {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} is refused: it is corrupt, or its pickle holds objects besides tensors, which could run code "
            f"when they are loaded. Save its state dict with `torch.save(model.state_dict(), ...)`. Reason: {error}"
        ) from error
    except Exception as error:
        raise ConversionError(
            f"{path.name} cannot be read; it is corrupt, truncated or no checkpoint: {error}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{path.name} holds a {type(checkpoint).__name__}, not a dictionary of tensors.")
    return checkpoint


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
    if isinstance(config, dict):
        model = model_class(**config)
        problems = model.load_state_dict(state_dict, strict=False)
        missing, unexpected = problems.missing_keys, problems.unexpected_keys
    else:
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state_dict, output_loading_info=True
            )
        except RuntimeError as error:
            raise ConversionError(f"{source} does not fit {model_class.__name__}: {error}") from error
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing or unexpected:
        problems = []
        if missing:
            problems.append(f"no weights for {_names(missing)}")
        if unexpected:
            problems.append(f"no place for {_names(unexpected)}")
        raise ConversionError(f"{source} does not fit {model_class.__name__}: {'; '.join(problems)}.")
    return model.eval()


def from_official(
    slug: str,
    state_dict_or_path: Mapping[str, torch.Tensor] | str | Path,
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """Turn a checkpoint of a paper's official code into a model of this package.

    Args:
        slug: the paper, as in the catalogue.
        state_dict_or_path: official state dict, or a ``.safetensors`` or PyTorch file.
        config: official constructor arguments, or the official configuration file's; families that can read them off
            the shapes of the weights need none.

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
        source, tensors = Path(state_dict_or_path).name, read_checkpoint(state_dict_or_path)
    else:
        source, tensors = "The state dict", state_dict_or_path
    official = StateDict(tensors)
    converted = import_module(paper.converter_module).convert_official(official, OfficialArguments(config or {}))
    left_over = set(official.left_over) - set(converted.dropped)
    if left_over:
        raise ConversionError(f"{source} has keys that {slug} does not know: {_names(left_over)}.")
    return load_strict(converted.model_class, converted.config, converted.state_dict, source)
