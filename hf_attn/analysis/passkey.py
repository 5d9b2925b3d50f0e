"""The pass-key test: whether a language model finds a number that a long text of filler mentions once.

The text of arXiv 2305.16300 (section 4.2): an instruction, filler, the number, filler, and a question whose answer the model
continues with. Scored is the first whole number that it writes.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .figures import new_figure


INSTRUCTION = "Somewhere in the following text a pass key is mentioned. Remember it, you will be asked for it.\n"
FILLER = "The grass is green. The sky is blue. The sea is deep. The road goes on, and it comes back again. "
NEEDLE = "The pass key is {passkey}. Remember it. {passkey} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"
MAX_PASSKEY = 50_000
#: enough for the digits of the largest number, one token each, and what may stand before it
NEW_TOKENS = 10


@dataclass(frozen=True)
class PasskeyAnswer:
    """One prompt and what became of it.

    Attributes:
        num_tokens: the length that was asked for; the prompt is shorter by less than one repetition of the filler.
        depth: where the number stands, from 0 (before all filler) to 1 (after it).
        passkey: the number.
        answer: what the model wrote.
    """

    num_tokens: int
    depth: float
    passkey: int
    answer: str

    @property
    def is_correct(self) -> bool:
        number = re.search(r"\d+", self.answer)
        return number is not None and int(number.group()) == self.passkey


@dataclass(frozen=True)
class PasskeyResult:
    """Answers to prompts of several lengths and depths; printed, a table of accuracies with a line a length."""

    answers: tuple[PasskeyAnswer, ...]

    @property
    def lengths(self) -> list[int]:
        return sorted({answer.num_tokens for answer in self.answers})

    @property
    def depths(self) -> list[float]:
        return sorted({answer.depth for answer in self.answers})

    def accuracy(self, num_tokens: int, depth: float | None = None) -> float:
        """Share of right answers at a length, and at one depth if it is given; NaN if there was no prompt."""
        correct = [
            answer.is_correct
            for answer in self.answers
            if answer.num_tokens == num_tokens and depth in (None, answer.depth)
        ]
        return sum(correct) / len(correct) if correct else float("nan")

    def num_prompts(self, num_tokens: int) -> int:
        return sum(answer.num_tokens == num_tokens for answer in self.answers)

    def __str__(self) -> str:
        depths = "".join(f"{f'at {depth:g}':>9}" for depth in self.depths)
        lines = [f"{'tokens':>7}{depths}{'all':>9}{'prompts':>9}"]
        for length in self.lengths:
            shares = [self.accuracy(length, depth) for depth in (*self.depths, None)]
            cells = "".join(f"{share:>9.0%}" if share == share else f"{'-':>9}" for share in shares)
            lines.append(f"{length:>7}{cells}{self.num_prompts(length):>9}")
        return "\n".join(lines)


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, num_tokens: int, depth: float, passkey: int) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the model.
        num_tokens: the most that it may have; filler is repeated as a whole as often as it fits.
        depth: share of the filler before the number, from 0 to 1.
        passkey: the number.

    Raises:
        ValueError: for a depth out of range, or a length that has no room for the instruction, the number and the question.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is a share between 0 and 1, got {depth}.")

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    start = [tokenizer.bos_token_id] if begins_with_bos else []
    start += tokens(INSTRUCTION)
    filler, needle, question = tokens(FILLER), tokens(NEEDLE.format(passkey=passkey)), tokens(QUESTION)
    room = num_tokens - len(start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"A pass-key prompt needs at least {num_tokens - room} tokens, got num_tokens={num_tokens}.")
    repetitions = room // len(filler)
    before = round(depth * repetitions)
    return start + before * filler + needle + (repetitions - before) * filler + question


@torch.no_grad()
def passkey_test(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: Sequence[int] = (1024, 2048, 4096),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    trials: int | Sequence[int] = 1,
    seed: int = 0,
    progress: bool = True,
    **generate_arguments,
) -> PasskeyResult:
    """Ask a model for the number in prompts of several lengths, one at a time, with greedy decoding.

    Args:
        model: any causal language model with `generate`, in eval mode.
        tokenizer: its tokenizer.
        num_tokens: lengths of the prompts.
        depths: where the number stands, each a share of the filler.
        trials: prompts for each length and depth; one number, or one for each length.
        seed: of the numbers. The same arguments give the same prompts for every model.
        progress: whether to show a progress bar.
        generate_arguments: for `generate`, such as `cache_top_k=4` of a model with landmarks.

    Raises:
        ValueError: for lengths or depths that no prompt can have.
    """
    each = [trials] * len(num_tokens) if isinstance(trials, int) else list(trials)
    if len(each) != len(num_tokens):
        raise ValueError(f"trials has {len(each)} numbers for {len(num_tokens)} lengths.")
    cases = [
        (length, depth, random.Random(f"{seed} {length} {depth} {trial}").randint(1, MAX_PASSKEY))
        for length, count in zip(num_tokens, each, strict=True)
        for depth in depths
        for trial in range(count)
    ]
    answers = []
    for length, depth, passkey in tqdm(cases, desc="Pass keys", unit="prompt", disable=not progress):
        prompt = torch.tensor([passkey_prompt(tokenizer, length, depth, passkey)], device=model.device)
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **generate_arguments,
        )
        answer = tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
        answers.append(PasskeyAnswer(length, depth, passkey, answer))
    return PasskeyResult(tuple(answers))


def _lines(results: Mapping[str, PasskeyResult]) -> Iterator[tuple[str, list[int], list[float]]]:
    for name, result in results.items():
        yield name, result.lengths, [100 * result.accuracy(length) for length in result.lengths]


def plot_passkey(results: Mapping[str, PasskeyResult], path: str | Path) -> None:
    """Draw the accuracy of several models over the length of the prompt.

    Args:
        results: by the name of the model.
        path: file to write; its suffix sets the format.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
    """
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    markers = "osD^v"
    for index, (name, lengths, shares) in enumerate(_lines(results)):
        axes.plot(lengths, shares, marker=markers[index % len(markers)], label=name, alpha=0.8)
    ticks = sorted({length for result in results.values() for length in result.lengths})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.minorticks_off()
    axes.set(xlabel="prompt tokens", ylabel="right answers (%)", ylim=(-4, 104), title="Pass-key test")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
