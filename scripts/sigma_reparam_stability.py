#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Effect of sigma-reparametrisation on the training of a deep transformer at a high learning rate (arXiv 2303.06296).

Trains BERT-type encoders, 12 layers deep, on the handwritten digits of scikit-learn as 16 tokens of 2 x 2 pixels, with Adam
at a constant learning rate, without warm-up, weight decay and gradient clipping. Each is trained as it is and
reparametrised, from the same initial function on the same batches. The encoders have LayerNorm after each residual sum
(`post_ln`) or none at all (`no_ln`).

    python scripts/sigma_reparam_stability.py --output_dir stability

About 11 minutes on one core. Prints a table, writes `results.json`, and draws the curves of loss and attention entropy at the
highest learning rate in `stability.png`. At the lower learning rate both forms train about equally well: what the
reparametrisation brings is the range of learning rates, and attention whose entropy does not collapse.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_attn.analysis.entropy_callback import AttentionEntropyCallback
from hf_attn.patching.sigma_reparam import apply_sigma_reparam
from hf_attn.training.arguments import Parser, run_script, stop
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


NAME = "sigma_reparam_stability.py"


ARCHITECTURES = ("post_ln", "no_ln")
NUM_CLASSES, PATCH_SIZE = 10, 2
#: pixels have this mean; twice their deviation from it has about unit variance
MEAN_PIXEL = 0.3
#: images on which the entropy is measured
NUM_WATCHED = 64
#: steps over which the final loss is averaged
LAST_STEPS = 20


class DigitsEncoder(BertPreTrainedModel):
    """BERT on patches of an image, classified by the mean of its tokens."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.patches = nn.Linear(PATCH_SIZE**2, config.hidden_size)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
        # BERT's standard deviation of 0.02 is not meant for 4 pixels: without LayerNorm the signal would die out.
        self.patches.reset_parameters()
        self.classifier.reset_parameters()

    def forward(self, patches: torch.Tensor, output_attentions: bool = False) -> SequenceClassifierOutput:
        """Classify images given as patches `(batch, tokens, pixels)`."""
        outputs = self.bert(inputs_embeds=self.patches(patches), output_attentions=output_attentions)
        logits = self.classifier(outputs.last_hidden_state.mean(dim=1))
        return SequenceClassifierOutput(logits=logits, attentions=outputs.attentions)


@dataclass
class Run:
    """One training run; entropies are in nats, `entropy_steps` the steps at which they were measured."""

    architecture: str
    reparametrised: bool
    learning_rate: float
    seed: int
    losses: list[float] = field(default_factory=list)
    entropy_steps: list[int] = field(default_factory=list)
    mean_entropy: list[float] = field(default_factory=list)
    lowest_layer: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def name(self) -> str:
        return "sigma-reparam" if self.reparametrised else "plain"

    @property
    def final_loss(self) -> float:
        return statistics.fmean(self.losses[-LAST_STEPS:])


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def load_digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Patches `(images, tokens, pixels)` and classes of the splits `train` and `test`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise stop(NAME, "the digits need the extra `train`: pip install 'hf_attn[train]'") from error

    digits = load_digits()
    images = 2 * (torch.tensor(digits.images, dtype=torch.float32) / 16 - MEAN_PIXEL)
    patches = images.unfold(1, PATCH_SIZE, PATCH_SIZE).unfold(2, PATCH_SIZE, PATCH_SIZE).flatten(3).flatten(1, 2)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_back = len(labels) // 5
    return {
        "train": (patches[order[held_back:]], labels[order[held_back:]]),
        "test": (patches[order[:held_back]], labels[order[:held_back]]),
    }


def make_model(architecture: str, options: argparse.Namespace) -> DigitsEncoder:
    config = BertConfig(
        vocab_size=1,  # tokens are given as embeddings
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.depth,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=NUM_CLASSES,
        pad_token_id=None,
    )
    model = DigitsEncoder(config)
    if architecture == "no_ln":
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        for name in norms:
            model.set_submodule(name, nn.Identity())
    return model


def train(run: Run, data: dict[str, tuple[torch.Tensor, torch.Tensor]], options: argparse.Namespace) -> None:
    """Train until the last step or a loss that is not finite, and note the curves in the run."""
    torch.manual_seed(run.seed)
    model = make_model(run.architecture, options)
    if run.reparametrised:
        apply_sigma_reparam(model, init=options.init)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    (patches, labels), (test_patches, test_labels) = data["train"], data["test"]
    watch = AttentionEntropyCallback({"patches": test_patches[:NUM_WATCHED]})
    generator = torch.Generator().manual_seed(run.seed)
    name = f"{run.architecture} {run.name} lr {run.learning_rate:g} seed {run.seed}"
    model.train()
    for step in tqdm(range(options.steps), desc=name, leave=False):
        if step % options.entropy_every == 0:
            note_entropy(run, watch, model, step)
        batch = torch.randint(len(labels), (options.batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(model(patches[batch]).logits, labels[batch])
        run.losses.append(loss.item())
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    note_entropy(run, watch, model, len(run.losses))
    model.eval()
    with torch.no_grad():
        predictions = model(test_patches).logits.argmax(dim=-1)
    run.accuracy = (predictions == test_labels).float().mean().item()


def note_entropy(run: Run, watch: AttentionEntropyCallback, model: DigitsEncoder, step: int) -> None:
    layers = [statistics.fmean(heads) for heads in watch.measure(model, step)["entropy"]]
    run.entropy_steps.append(step)
    run.mean_entropy.append(statistics.fmean(layers))
    run.lowest_layer.append(min(layers))


def print_table(runs: list[Run]) -> None:
    """One line for each run: loss and accuracy at the end, mean entropy at the end, lowest of a layer at any time."""
    print(
        f"Uniform attention has an entropy of {math.log(16):.2f} nats, a guess a loss of {math.log(NUM_CLASSES):.2f}."
    )
    header = ("model", "lr", "seed", "", "loss", "accuracy", "entropy", "lowest")
    line = "{:>8} {:>6} {:>4}  {:<13} {:>8} {:>8} {:>8} {:>7}"
    print(line.format(*header))
    for run in runs:
        finite = [entropy for entropy in run.lowest_layer if math.isfinite(entropy)]
        numbers = (run.final_loss, run.accuracy, run.mean_entropy[-1], min(finite))
        print(
            line.format(
                run.architecture,
                f"{run.learning_rate:g}",
                run.seed,
                run.name,
                *(f"{number:.3f}" for number in numbers),
            )
        )


def plot(runs: list[Run], path: Path) -> None:
    """Draw loss and entropy over the steps; one line a run."""
    from matplotlib.figure import Figure

    architectures = list(dict.fromkeys(run.architecture for run in runs))
    figure = Figure(figsize=(10, 3.2 * len(architectures)), layout="constrained")
    grid = figure.subplots(len(architectures), 2, squeeze=False)
    figure.suptitle(f"learning rate {runs[0].learning_rate:g}")
    for (loss_axes, entropy_axes), architecture in zip(grid, architectures, strict=True):
        loss_axes.axhline(math.log(NUM_CLASSES), color="grey", linestyle=":", label="a guess")
        entropy_axes.axhline(math.log(16), color="grey", linestyle=":", label="uniform attention")
        for run in (run for run in runs if run.architecture == architecture):
            style = {"color": "tab:blue" if run.reparametrised else "tab:red"}
            label = run.name if run.seed == runs[0].seed else None
            loss_axes.plot(run.losses, label=label, linewidth=1, **style)
            entropy_axes.plot(run.entropy_steps, run.mean_entropy, label=label, **style)
            if not math.isfinite(run.losses[-1]):
                last = max(index for index, value in enumerate(run.mean_entropy) if math.isfinite(value))
                entropy_axes.plot(run.entropy_steps[last], run.mean_entropy[last], marker="x", markersize=10, **style)
        loss_axes.set(title=f"{architecture}: training loss", xlabel="step", ylim=(0, 4))
        entropy_axes.set(title=f"{architecture}: entropy of attention (nats)", xlabel="step", ylim=(0, 3))
        for axes in (loss_axes, entropy_axes):
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the experiment; returns its runs."""
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--init", choices=["preserve", "unit"], default="preserve", help="As in apply_sigma_reparam.")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--depth", type=positive, default=12)
    parser.add_argument("--hidden_size", type=positive, default=64)
    parser.add_argument(
        "--entropy_every", type=positive, default=10, help="Steps between two measurements of the entropy."
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Start anew; an earlier run is kept.")
    options = parser.parse_args(arguments)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("output_dir", "overwrite_output_dir")
    }
    try:
        with output_folder(options.output_dir, settings, options.overwrite_output_dir, command=NAME, continues=False):
            return compare(options)
    except OutputFolderError as error:
        raise stop(NAME, error) from error


def compare(options: argparse.Namespace) -> list[Run]:
    """Train all models, and report."""
    data = load_digits()
    runs = [
        Run(architecture, reparametrised, learning_rate, seed)
        for architecture, learning_rate, seed, reparametrised in product(
            options.architectures, options.learning_rates, options.seeds, (False, True)
        )
    ]
    for run in tqdm(runs, desc="runs"):
        train(run, data, options)
    print_table(runs)
    with written_whole(options.output_dir / "results.json") as part:
        part.write_text(json.dumps([asdict(run) for run in runs]), encoding="utf-8")
    highest = max(options.learning_rates)
    plot([run for run in runs if run.learning_rate == highest], options.output_dir / "stability.png")
    return runs


if __name__ == "__main__":
    run_script(NAME, main)
