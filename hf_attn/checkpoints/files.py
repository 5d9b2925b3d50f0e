"""Reading official checkpoints from files, whole or in shards, without running any code that is in them."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


#: names of checkpoint files in a folder; names and order are transformers', where a single file precedes shards
CHECKPOINT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: end of the name of an index of shards
INDEX_SUFFIX = ".index.json"


class ConversionError(ValueError):
    """A checkpoint does not fit: keys are left over, keys are missing, shapes differ, or the file cannot be read."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors` or a PyTorch file (`.pth`, `.pt`, `.bin`) without running any code from it.

    Returns:
        What the file holds: a state dict, or what training code has put around it (see
        [`hf_attn.checkpoints.official.select_state_dict`]).

    Raises:
        ConversionError: if the file is corrupt, truncated or of another kind, or if its pickle needs more than tensors
            and plain containers.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return dict(_open_safetensors(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise ConversionError(
                f"{path.name} is refused: besides tensors it contains a reference to {refused[1]}, and loading it "
                "could run code. If you trust its source, load it with `torch.load(..., weights_only=False)` and "
                "pass its state dict, or save the state dict to a file."
            ) from error
        raise _unreadable(path, error, with_reason=not isinstance(error, pickle.UnpicklingError)) from error
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{path.name} contains a {type(checkpoint).__name__}, not a dictionary of tensors.")
    return checkpoint


def open_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Open a checkpoint: a file as of [`read_checkpoint`], the index of a sharded one, or a folder with either.

    Returns:
        What the checkpoint holds. From safetensors a tensor is read on access; of PyTorch shards, the shard that
        it is in.

    Raises:
        ConversionError: as [`read_checkpoint`], also for a folder without a checkpoint and an index that makes no sense;
            and, on access to a tensor, if its shard does not exist.
    """
    path = _existing(_found_in_folder(Path(path)))
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    return _open_file(path)


class LazyTensors(Mapping):
    """State dict whose tensors are read on access.

    Args:
        readers: for each key what reads its tensor.
    """

    def __init__(self, readers: Mapping[str, Callable[[], torch.Tensor]]):
        self._readers = dict(readers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._readers[key]()

    def __contains__(self, key) -> bool:
        return key in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _found_in_folder(path: Path) -> Path:
    """The checkpoint file or index in a folder; other paths unchanged."""
    if not path.is_dir():
        return path
    found = next((path / name for name in CHECKPOINT_NAMES if (path / name).is_file()), None)
    if found is None:
        raise ConversionError(
            f"There is no checkpoint file at {path}: the folder has none of {', '.join(CHECKPOINT_NAMES)}. Pass the "
            "path of the file."
        )
    return found


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no checkpoint file at {path}.")
    return path


def _unreadable(path: Path, error: Exception, with_reason: bool = True) -> ConversionError:
    reason = str(error).split("\n")[0] if with_reason else ""
    return ConversionError(
        f"{path.name} cannot be read: it is corrupt, truncated or not a checkpoint{reason and f' ({reason})'}."
    )


def _open_file(path: Path) -> Mapping[str, Any]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)


def _open_safetensors(path: Path) -> LazyTensors:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return LazyTensors({name: lambda name=name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _open_shards(index: Path) -> LazyTensors:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {name: Path(shard) for name, shard in shard_of.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{index.name} is not an index of a sharded checkpoint: it needs an entry 'weight_map' that maps the "
            "names of tensors to the names of files."
        ) from error
    outside = sorted({str(shard) for shard in names.values() if shard.name != str(shard)})
    if outside:
        raise ConversionError(f"{index.name} names files that are not in its folder: {', '.join(outside)}.")

    # Names of one shard follow each other, so that one shard at a time is enough.
    opened: dict[Path, Mapping[str, torch.Tensor]] = {}

    def read(name: str, shard: Path) -> torch.Tensor:
        if shard not in opened:
            if not (index.parent / shard).is_file():
                raise ConversionError(
                    f"{index.name} says that {name} is in {shard}, but this file is not in {index.parent}. Download "
                    "it as well."
                )
            opened.clear()
            opened[shard] = _open_file(index.parent / shard)
        if name not in opened[shard]:
            raise ConversionError(f"{index.name} says that {name} is in {shard}, but it is not.")
        return opened[shard][name]

    return LazyTensors({name: lambda name=name, shard=shard: read(name, shard) for name, shard in names.items()})
