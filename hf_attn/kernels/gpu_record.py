"""The GPU kernels that have passed `hf-attn check-gpu` on this machine.

The record is a JSON file in the user's cache. It holds what passed for each device and version of torch and triton, so that
another GPU or an update starts from nothing. No record means that nothing has passed.
"""

import importlib.metadata
import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import constants


def record_file() -> Path:
    """Where the record is: in `$HF_ATTN_CACHE`, else in `hf_attn` in the cache of Hugging Face."""
    folder = os.environ.get("HF_ATTN_CACHE") or Path(constants.HF_HOME, "hf_attn")
    return Path(folder, "gpu_kernels.json").expanduser()


def environment_key(device_name: str) -> str:
    """Key of a result: device and versions of torch and triton."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"{device_name} | torch {torch.__version__} | triton {triton}"


def write_record(device_name: str, passed: dict[str, list[str]]) -> Path:
    """Replace what is recorded for a device under the installed versions.

    Args:
        device_name: as `torch.cuda.get_device_name` has it.
        passed: kernel (`"sigmoid_triton"`) -> dtypes (`"float16"`) in which all of its checks passed.

    Returns:
        The file that was written.
    """
    file = record_file()
    record = _read(file) | {environment_key(device_name): passed}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    beside.replace(file)
    passed_kernels.cache_clear()
    return file


def _read(file: Path) -> dict[str, dict[str, list[str]]]:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        # No record, or a truncated one: no kernel has passed, and the next check writes a new record.
        return {}
    return record if isinstance(record, dict) else {}


@lru_cache
def passed_kernels(device_name: str) -> dict[str, list[str]]:
    """Kernel -> dtypes in which it passed on a device under the installed versions."""
    return _read(record_file()).get(environment_key(device_name), {})


def is_proven(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel has passed on a device in a dtype."""
    return _is_proven(kernel, device.type, device.index, str(dtype).removeprefix("torch."))


# torch.compile calls it while it traces, instead of following it into files
@torch.compiler.assume_constant_result
def _is_proven(kernel: str, device_type: str, device_index: int | None, dtype: str) -> bool:
    if device_type != "cuda":
        return False
    return dtype in passed_kernels(torch.cuda.get_device_name(device_index)).get(kernel, ())
