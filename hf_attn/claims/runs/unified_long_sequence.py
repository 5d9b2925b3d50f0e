"""Token mixers: time against the length, and what a longer context is worth to them in two tasks.

Softmax attention, by torch's `scaled_dot_product_attention`, is timed against the mixers whose cost is not quadratic.
Language models with attention and with two other causal mixers learn the characters of text, and to recall: a stream
states facts, a key with its value, and asks for the value of a key. They are trained on pieces of 16 or of 64 tokens,
with the same total number of tokens, and evaluated on the same last tokens; under this budget a longer context can
also do harm.

Shown in small if

1. each of the other mixers takes less time than attention at the greatest length,
2. with attention the longer context reduces the loss in both tasks together, and by a share that differs between them
   for every seed by more than the spread.

Contradicted if none of the mixers takes less time, or if the longer context raises the loss in both tasks for every
seed. Otherwise not shown here. The quality of the other mixers is reported and decides nothing.
"""

import math
from functools import partial
from statistics import fmean

import torch
from torch.nn import functional as F

from ...mixers import TokenMixer
from ...modeling.unified_long_sequence.configuration_unified_long_sequence import TokenMixerConfig
from ...modeling.unified_long_sequence.modeling_unified_long_sequence import TokenMixerForCausalLM
from ..drawing import COLORS
from ..language import VOCAB_SIZE, characters
from ..result import Conclusion, Figure, agreement
from ..timing import least_cpu_seconds
from ..training import optimise, tuned


ATTENTION = "softmax"
#: mixers whose time grows more slowly than the square of the length
CHEAPER = (
    "linear_elu",
    "performer",
    "linformer",
    "window",
    "nystrom_pinv",
    "fourier",
    "mlp_mixer",
    "long_conv",
    "pooling",
)
TRAINED = (ATTENTION, "linear_elu", "long_conv")
TIMED_LENGTHS, WIDTH = (512, 2048, 8192), 64
SHORT, LONG = CONTEXTS = (16, 64)
#: tokens per step; number of last tokens that are evaluated; sequences per evaluation
TOKENS, EVALUATED, SEQUENCES = 1024, 8, 256
KEYS, VALUES = 8, 8
IGNORED = -100


def measure(work) -> dict:
    lengths, steps = ((64, 128), 2) if work.miniature else (TIMED_LENGTHS, 300)
    times = {str(length): work.part(f"times-{length}", times_at, length) for length in lengths}
    runs = {
        task: {
            mixer: {
                str(context): tuned(work, f"{task}-{mixer}-{context}", partial(learn, task, mixer, context, steps))
                for context in CONTEXTS
            }
            for mixer in TRAINED
        }
        for task in TASKS
    }
    return {"milliseconds": times, "steps": steps, "runs": runs}


def times_at(length: int) -> dict[str, float]:
    """Minimum CPU milliseconds of each mixer for one sequence."""
    torch.manual_seed(0)
    names = (ATTENTION, *CHEAPER)
    states = torch.randn(1, length, WIDTH)
    mixers = [TokenMixer.from_name(name, WIDTH, max_length=length, mixing_size=256).eval() for name in names]
    calls = [partial(torch.no_grad()(mixer), states) for mixer in mixers]
    return dict(zip(names, (1e3 * seconds for seconds in least_cpu_seconds(calls, 3)), strict=True))


def text(split: str, count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random stretches of a split, `(count, length)`, and labels: all characters are predicted."""
    codes = characters(split)
    stretches = codes[torch.randint(len(codes) - length, (count, 1), generator=generator) + torch.arange(length)]
    return stretches, stretches


def recall(split: str, count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams of facts and questions, `(count, length)`; the labels are the answers.

    A token is a fact, which names a key and its value, or a key that is asked for, or the value that follows it. A stream keeps its values.
    """
    del split  # streams are drawn at random
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    keys = torch.randint(KEYS, (count, length), generator=generator)
    starts = torch.rand(count, length, generator=generator) < 0.5
    streams, labels = torch.empty(count, length, dtype=torch.long), torch.full((count, length), IGNORED)
    answers = torch.zeros(count, dtype=torch.bool)
    for place in range(length):
        key = torch.where(answers, keys[:, place - 1], keys[:, place])
        value = values.gather(1, key[:, None])[:, 0]
        fact, question, answer = key * VALUES + value, KEYS * VALUES + key, KEYS * VALUES + KEYS + value
        streams[:, place] = torch.where(answers, answer, torch.where(starts[:, place], question, fact))
        labels[answers, place] = answer[answers]
        answers = starts[:, place] & ~answers
    return streams, labels


TASKS = {"text": text, "recall": recall}


def learn(task: str, mixer: str, context: int, steps: int, seed: int, rate: float) -> dict[str, float]:
    """Bits per predicted token on the validation and test splits."""
    torch.manual_seed(seed)
    model = TokenMixerForCausalLM(
        TokenMixerConfig(
            mixer=mixer,
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            max_position_embeddings=LONG,
        )
    )
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        return entropy(model, *TASKS[task]("train", TOKENS // context, context, generator))

    optimise(model, loss, steps, rate)
    return {split: bits(model, task, context, split) for split in ("validation", "test")}


def entropy(model, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def bits(model, task: str, context: int, split: str) -> float:
    """Loss on the last tokens of sequences; the model sees only the last `context` tokens."""
    generator = torch.Generator().manual_seed(len(split))
    inputs, labels = (part[:, -context:] for part in TASKS[task](split, SEQUENCES, LONG, generator))
    labels = labels.clone()
    labels[:, :-EVALUATED] = IGNORED
    return entropy(model, inputs, labels).item() / math.log(2)


def losses_of(data: dict, task: str, mixer: str) -> list[list[float]]:
    """Test losses of each context, for each seed."""
    return [[run["test"] for run in data["runs"][task][mixer][str(context)]] for context in CONTEXTS]


def conclude(data: dict) -> Conclusion:
    length, times = list(data["milliseconds"].items())[-1]
    figures = [
        Figure.of(
            f"time of {name}, {int(length):,} tokens", "CPU ms", times[name], "attention of torch", times[ATTENTION]
        )
        for name in CHEAPER
    ]
    worth = {}
    for task in TASKS:
        for mixer in TRAINED:
            short, long = losses_of(data, task, mixer)
            figures.append(
                Figure.of(f"loss on {task}, {mixer}, {LONG} tokens", "bits", long, f"{SHORT} tokens", short)
            )
            if mixer == ATTENTION:
                worth[task] = [100 * (1 - b / a) for a, b in zip(short, long, strict=True)]
    cheaper = [name for name in CHEAPER if times[name] < times[ATTENTION]]
    why = (
        f"{len(cheaper)} of {len(CHEAPER)} mixers take less time than attention at {int(length):,} tokens; with attention a context of {LONG} "
        f"instead of {SHORT} tokens changes the loss by "
        + " and ".join(f"{-fmean(shares):+.0f} % in {task}" for task, shares in worth.items())
        + "."
    )
    helps = fmean([*worth["text"], *worth["recall"]]) > 0
    verdict = "not shown here"
    if len(cheaper) == len(CHEAPER) and helps and agreement(worth["text"], worth["recall"]):
        verdict = "shown in small"
    elif not cheaper or all(max(shares) < 0 for shares in worth.values()):
        verdict = "contradicted here"
    return Conclusion(tuple(figures), verdict, why)


def draw(data: dict, figure) -> None:
    figure.set_size_inches(9, 3.6)
    left, *panels = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    lengths = [int(length) for length in data["milliseconds"]]
    colors = dict(zip(TRAINED, ("black", *COLORS), strict=False))
    for name in (*CHEAPER, ATTENTION):
        found = [times[name] for times in data["milliseconds"].values()]
        style = {"color": "black", "linewidth": 3, "label": "attention"} if name == ATTENTION else {"alpha": 0.5}
        if name in colors and name != ATTENTION:
            style = {"color": colors[name], "label": name}
        elif name == CHEAPER[1]:
            style |= {"color": "lightgrey", "label": "others"}
        elif name != ATTENTION:
            style |= {"color": "lightgrey"}
        left.loglog(lengths, found, "o-", markersize=3, **style)
    left.set_xticks(lengths, [f"{length:,}" for length in lengths])
    left.minorticks_off()
    left.set(xlabel="tokens", title="CPU ms of a call")
    left.legend(fontsize=8)
    for axes, task in zip(panels, TASKS, strict=True):
        for mixer in TRAINED:
            means = [fmean(losses) for losses in losses_of(data, task, mixer)]
            axes.plot(range(2), means, "o-", color=colors[mixer], linewidth=3 if mixer == ATTENTION else 1.5)
        axes.set_xticks(range(2), [f"{context} tokens" for context in CONTEXTS])
        axes.set_xlim(-0.3, 1.3)
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.set(xlabel="context", title=f"bits per token: {task}\n(lower is better)")
