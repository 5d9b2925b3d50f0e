"""Sources of the lengths of a batch: a file, a tokenised dataset, or a named distribution."""

import json
import math
import random
from pathlib import Path

from .partition import PlanError


#: name -> distribution
DISTRIBUTIONS = {
    "short": "lognormal, median 600 tokens",
    "mid": "lognormal, median 6,000 tokens",
    "long": "log-uniform from 1,000 to 64,000 tokens",
    "web": "web documents: half of them below 500 tokens, 1.3% above 16,000",
}
#: upper bounds of lengths and fraction of documents, from a public histogram of web documents (not the paper's)
_WEB = (
    (500, 0.47),
    (1024, 0.25),
    (2048, 0.16),
    (4096, 0.073),
    (8192, 0.031),
    (16384, 0.013),
    (32768, 0.0085),
    (65536, 0.0045),
)


def sample_lengths(name: str, tokens: int, seed: int = 0) -> list[int]:
    """Draw sequence lengths until they sum to `tokens`; the last one is cut to fit.

    Args:
        name: one of [`DISTRIBUTIONS`].
        tokens: of the batch.
        seed: of the generator.

    Raises:
        PlanError: for another name, or no tokens.
    """
    if name not in DISTRIBUTIONS:
        raise PlanError(f"There is no distribution {name!r}. Available: {', '.join(DISTRIBUTIONS)}.")
    if tokens < 1:
        raise PlanError(f"A batch needs at least one token, got {tokens}.")
    generator = random.Random(f"{name} {seed}")
    lengths = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(16, _draw(name, generator))))
    return lengths


def _draw(name: str, generator: random.Random) -> int:
    if name == "long":
        return int(math.exp(generator.uniform(math.log(1000), math.log(64000))))
    if name != "web":
        return int(generator.lognormvariate(math.log({"short": 600, "mid": 6000}[name]), 1.0))
    ((bucket, _),) = generator.choices(list(enumerate(_WEB)), [share for _, share in _WEB])
    lower = _WEB[bucket - 1][0] if bucket else 16
    return int(math.exp(generator.uniform(math.log(lower), math.log(_WEB[bucket][0]))))


def read_lengths(path: str | Path, limit: int | None = None) -> list[int]:
    """Lengths of a file or of a dataset.

    Args:
        path: a text file with one length per line, a JSON file with a list, or a folder of `datasets` (`save_to_disk`) with a
            column `length` or `input_ids`; if there are several splits, `train` is used.
        limit: number of sequences to take.

    Raises:
        PlanError: if the path does not exist, is empty, or does not contain lengths.
    """
    path = Path(path)
    if path.is_dir():
        lengths = _of_dataset(path, limit)
    elif path.is_file():
        lengths = _of_file(path)
    else:
        raise PlanError(
            f"{path} is neither a file of lengths, nor a folder of datasets, nor one of {', '.join(DISTRIBUTIONS)}."
        )
    if not lengths:
        raise PlanError(f"{path} contains no lengths.")
    return lengths if limit is None else lengths[:limit]


def _of_file(path: Path) -> list[int]:
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else [int(word) for word in text.split()]
    except ValueError as error:
        raise PlanError(f"{path} must contain one length per line, or a JSON list of lengths: {error}.") from error
    if not isinstance(found, list) or not all(type(length) is int for length in found):
        raise PlanError(f"{path} must contain a list of integers.")
    return found


def _of_dataset(path: Path, limit: int | None) -> list[int]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Reading a folder of datasets needs the extra `train`: pip install 'hf_attn[train]'."
        ) from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise PlanError(f"{path} is not a folder written by `Dataset.save_to_disk`.") from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if "length" in dataset.column_names:
        return list(dataset["length"])
    if "input_ids" in dataset.column_names:
        return [len(ids) for ids in dataset["input_ids"]]
    raise PlanError(f"{path} has no column `length` or `input_ids`, only {', '.join(dataset.column_names)}.")
