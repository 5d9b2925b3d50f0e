"""MemoryFormer: operations of a block for a token, and the loss against a GPT-NeoX of the same shape, whose layers are linear.

Shown in small if a block needs less than half the operations of one with matrices at the three published shapes, and the model learns text
at least as well as GPT-NeoX of transformers (no seed order against it). Contradicted if it needs more operations. If it learns less
well, the saving is shown but the quality is not, and the verdict is "not shown here".
"""

from functools import partial

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ...modeling.memoryformer.configuration_memoryformer import MemoryFormerConfig
from ...modeling.memoryformer.flops import block_flops
from ...modeling.memoryformer.modeling_memoryformer import MemoryFormerForCausalLM
from ..drawing import COLORS, bars
from ..language import VOCAB_SIZE, train_language_model
from ..result import Conclusion, Figure, agreement
from ..training import operations, tuned


SEQUENCE = 2048
SHAPES = ("tiny_70m", "small_160m", "base_410m")
WIDTH, LAYERS, HEADS = 96, 2, 4


def measure(work) -> dict:
    steps = 4 if work.miniature else 300
    return {
        "operations": [[name, *counted(MemoryFormerConfig.from_variant(name))] for name in SHAPES],
        "memory": tuned(work, "memoryformer", partial(learn, memoryformer, steps), (3e-3, 1e-2)),
        "linear": tuned(work, "gpt-neox", partial(learn, gpt_neox, steps), (1e-3, 3e-3)),
    }


def counted(config: MemoryFormerConfig) -> tuple[float, float]:
    """Millions of operations per token of a block of MemoryFormer and of GPT-NeoX; torch's count has to agree for the latter."""
    found = block_flops(config, SEQUENCE)
    ours = found["attention"] + found["memory_layers"] + found["hashes"]
    theirs = found["attention"] + found["standard_layers"]
    shape = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads}
    with torch.device("meta"):
        block = GPTNeoXForCausalLM(
            GPTNeoXConfig(**shape, intermediate_size=4 * config.hidden_size, num_hidden_layers=1, vocab_size=8)
        ).gpt_neox
        counted = operations(block, torch.zeros(1, SEQUENCE, dtype=torch.long))
    if abs(counted - theirs) > 0.01 * theirs:
        raise RuntimeError(f"torch counts {counted} operations in a block of linear layers, the formula {theirs}.")
    return ours / SEQUENCE / 1e6, theirs / SEQUENCE / 1e6


def memoryformer() -> MemoryFormerForCausalLM:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return MemoryFormerForCausalLM(MemoryFormerConfig(vocab_size=VOCAB_SIZE, **shape))


def gpt_neox() -> GPTNeoXForCausalLM:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB_SIZE, intermediate_size=4 * WIDTH, **shape))


def learn(make_model, steps: int, seed: int, rate: float) -> dict:
    return train_language_model(make_model, steps, seed, rate)[1]


def conclude(data: dict) -> Conclusion:
    memory, linear = ([run["test"] for run in data[side]] for side in ("memory", "linear"))
    shares = [100 * ours / theirs for _, ours, theirs in data["operations"]]
    name, ours, theirs = data["operations"][-1]
    figures = (
        Figure.of(f"operations of a block for a token ({name})", "million", ours, "linear layers", theirs),
        Figure.of(
            f"loss on held-out text, width {WIDTH}, {LAYERS} layers",
            "bits/character",
            memory,
            "GPT-NeoX of transformers",
            linear,
        ),
    )
    shares_text = ", ".join(f"{share:.0f}" for share in shares)
    if max(shares) >= 100:
        return Conclusion(figures, "contradicted here", f"A block needs {shares_text} % of the operations.")
    order = agreement(memory, linear)
    quality = {1: "learns less well", 0: "learns as well", -1: "learns better"}[order]
    shown = max(shares) < 50 and order <= 0
    return Conclusion(
        figures,
        "shown in small" if shown else "not shown here",
        f"A block needs {shares_text} % of the operations of one with linear layers at the three published shapes, and the small model "
        f"{quality} in the same number of steps.",
    )


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for index, (_, ours, theirs) in enumerate(data["operations"]):
        left.bar(index - 0.2, theirs, 0.4, color=COLORS[1], alpha=0.7, label=None if index else "linear layers")
        left.bar(index + 0.2, ours, 0.4, color=COLORS[0], alpha=0.7, label=None if index else "memory layers")
        left.annotate(f"{ours / theirs:.0%}", (index + 0.2, ours), (0, 3), textcoords="offset points", ha="center")
    left.set_xticks(range(len(data["operations"])), [name.replace("_", "\n") for name, *_ in data["operations"]])
    left.set_title("million operations of a block\nfor a token, 2,048 tokens")
    left.legend()
    sides = {"MemoryFormer": data["memory"], "GPT-NeoX": data["linear"]}
    losses = {name: [run["test"] for run in runs] for name, runs in sides.items()}
    bars(right, losses, "bits/character", "loss on held-out text\n(lower is better)")
