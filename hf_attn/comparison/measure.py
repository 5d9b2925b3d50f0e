"""Train and measure one entry in a separate process: `python -m hf_attn.comparison.measure JOB.json RESULT.json`."""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..training.writing import written_whole
from .data import IGNORED, Corpus
from .entries import Shape, make_model


#: number of held-out sequences, and of samples of each synthetic task, in the evaluation
TEST_SEQUENCES = 32
DECODED_TOKENS = 32


def _prepared(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch in the form that the model needs; models whose inputs contain more than the text prepare it themselves."""
    prepare = getattr(model, "prepare_training_batch", None)
    return batch if prepare is None else prepare(**batch)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int) -> float:
    """Mean loss per token of the text."""
    losses, counts = 0.0, 0
    for part in sequences.split(batch_size):
        batch = _prepared(model, {"input_ids": part, "labels": part.clone()})
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        losses, counts = losses + model(**batch).loss.item() * count, counts + count
    return losses / counts


@torch.no_grad()
def _accuracy(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Accuracy of the most probable tokens at the queried positions."""
    batch = _prepared(model, batch)
    labels = batch.pop("labels")[:, 1:]
    asked = labels != IGNORED
    predicted = model(**batch).logits[:, :-1].argmax(-1)
    return (predicted[asked] == labels[asked]).float().mean().item()


def _is_part_of_a_cache(value) -> bool:
    own = type(value).__module__.startswith("hf_attn.") and not isinstance(value, PreTrainedConfig)
    return own or isinstance(value, CacheLayerMixin)


def _cache_bytes(cache) -> int:
    """Bytes of all tensors in the layers of a cache."""
    seen, total, waiting = set(), 0, list(getattr(cache, "layers", []))
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple | dict):
            waiting += value.values() if isinstance(value, dict) else value
        elif id(value) not in seen and _is_part_of_a_cache(value):
            seen.add(id(value))
            waiting += vars(value).values()
    return total


@torch.no_grad()
def _cache_bytes_a_token(model: PreTrainedModel, input_ids: torch.Tensor) -> float | None:
    """Growth of the cache in bytes per token of a sequence."""
    half = input_ids.shape[1] // 2
    sizes = []
    for length in (half, input_ids.shape[1]):
        cache = getattr(model(input_ids[:, :length], use_cache=True), "past_key_values", None)
        if cache is None:
            return None
        sizes.append(_cache_bytes(cache))
    return (sizes[1] - sizes[0]) / (input_ids.shape[0] * (input_ids.shape[1] - half))


@torch.no_grad()
def _decode_speed(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """New tokens per second for one sequence after a prompt; the best of three runs, as the machine may be busy."""
    times = {1: math.inf, 1 + DECODED_TOKENS: math.inf}
    for _ in range(3):
        for new_tokens, best in times.items():
            start = time.perf_counter()
            model.generate(
                input_ids[:1],
                attention_mask=torch.ones_like(input_ids[:1]),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            times[new_tokens] = min(best, time.perf_counter() - start)
    return DECODED_TOKENS / max(times[1 + DECODED_TOKENS] - times[1], 1e-9)


def _forget_peak() -> int | None:
    """Reset the peak of the resident memory; returns its current size in bytes, or None if the system does not support this."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def train(model: PreTrainedModel, corpus: Corpus, job: dict) -> tuple[list[float], float]:
    """Train with AdamW, warm-up and linear decay; returns the loss of each step and the tokens per second.

    The speed is that of the median step, which a short period of other load does not change.
    """
    generator = torch.Generator().manual_seed(job["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.1, betas=(0.9, 0.95))
    warm_up = max(1, job["steps"] // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (job["steps"] - step) / job["steps"])
    )
    model.train()
    losses, seconds = [], []
    for _ in tqdm(range(job["steps"]), desc=f"{job['entry']} seed {job['seed']}", leave=False):
        start = time.perf_counter()
        batch = corpus.training_batch(job["batch_size"], job["length"], generator)
        loss = model(**_prepared(model, batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, job["batch_size"] * job["length"] / statistics.median(seconds)


def measure(job: dict) -> dict:
    """Train and measure the entry of a job.

    Args:
        job: `entry`, `seed`, `steps`, `batch_size`, `length`, `learning_rate`, `shape`, and `corpus`, a file of tensors.

    Returns:
        The values of the columns of the comparison.
    """
    tensors = load_file(job["corpus"])
    corpus = Corpus(tensors["train"], tensors["test"], first_symbol=job["first_symbol"])
    torch.manual_seed(job["seed"])
    model = make_model(job["entry"], Shape(**job["shape"]))
    before = _forget_peak()
    losses, tokens_a_second = train(model, corpus, job)
    peak = None if before is None else _status("VmHWM") - before
    model.eval()
    generator = torch.Generator().manual_seed(12345)
    length, batch_size = job["length"], job["batch_size"]
    result = {
        "entry": job["entry"],
        "seed": job["seed"],
        "parameters": model.num_parameters(),
        "losses": losses,
        "training_tokens_a_second": tokens_a_second,
        "peak_memory": peak,
    }
    for times in (1, 2, 4):
        loss = _mean_loss(model, corpus.held_out(times * length, TEST_SEQUENCES), batch_size)
        result[f"loss_{times}x"] = loss
        result[f"perplexity_{times}x"] = math.exp(loss) if loss < 700 else math.inf
    for times in (1, 2):
        for task in ("recall", "copying"):
            batch = getattr(corpus, task)(TEST_SEQUENCES, times * length, generator)
            result[f"{task}_{times}x"] = _accuracy(model, batch)
    prompt = corpus.held_out(2 * length, 1)
    result["cache_bytes_a_token"] = _cache_bytes_a_token(model, prompt)
    result["decode_tokens_a_second"] = _decode_speed(model, prompt)
    return result


def main(job_file: str, result_file: str) -> None:
    result = measure(json.loads(Path(job_file).read_text(encoding="utf-8")))
    with written_whole(result_file) as part:
        part.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
