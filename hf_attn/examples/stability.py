"""Trainings of deep encoders on digits at high learning rates, with and without the sigma-reparametrisation (arXiv 2303.06296)."""

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..analysis.entropy_callback import AttentionEntropyCallback
from ..patching.sigma_reparam import apply_sigma_reparam


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


@dataclass(frozen=True)
class Setting:
    """What the runs share; `init` is that of `apply_sigma_reparam`, `entropy_every` is in steps."""

    steps: int = 400
    batch_size: int = 64
    depth: int = 12
    hidden_size: int = 64
    entropy_every: int = 10
    init: str = "preserve"


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


def load_digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Patches `(images, tokens, pixels)` and classes of the splits `train` and `test`.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits need the extra `train`: pip install 'hf_attn[train]'") from error

    digits = load_digits()
    images = 2 * (torch.tensor(digits.images, dtype=torch.float32) / 16 - MEAN_PIXEL)
    patches = images.unfold(1, PATCH_SIZE, PATCH_SIZE).unfold(2, PATCH_SIZE, PATCH_SIZE).flatten(3).flatten(1, 2)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = len(labels) // 5
    return {
        "train": (patches[order[held_out:]], labels[order[held_out:]]),
        "test": (patches[order[:held_out]], labels[order[:held_out]]),
    }


def make_model(architecture: str, setting: Setting) -> DigitsEncoder:
    config = BertConfig(
        vocab_size=1,  # tokens are given as embeddings
        hidden_size=setting.hidden_size,
        intermediate_size=2 * setting.hidden_size,
        num_hidden_layers=setting.depth,
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


def train(run: Run, data: dict[str, tuple[torch.Tensor, torch.Tensor]], setting: Setting) -> None:
    """Train until the last step or a loss that is not finite, and note the curves in the run."""
    torch.manual_seed(run.seed)
    model = make_model(run.architecture, setting)
    if run.reparametrised:
        apply_sigma_reparam(model, init=setting.init)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    (patches, labels), (test_patches, test_labels) = data["train"], data["test"]
    watch = AttentionEntropyCallback({"patches": test_patches[:NUM_WATCHED]})
    generator = torch.Generator().manual_seed(run.seed)
    name = f"{run.architecture} {run.name} lr {run.learning_rate:g} seed {run.seed}"
    model.train()
    for step in tqdm(range(setting.steps), desc=name, leave=False):
        if step % setting.entropy_every == 0:
            _note_entropy(run, watch, model, step)
        batch = torch.randint(len(labels), (setting.batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(model(patches[batch]).logits, labels[batch])
        run.losses.append(loss.item())
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _note_entropy(run, watch, model, len(run.losses))
    model.eval()
    with torch.no_grad():
        predictions = model(test_patches).logits.argmax(dim=-1)
    run.accuracy = (predictions == test_labels).float().mean().item()


def _note_entropy(run: Run, watch: AttentionEntropyCallback, model: DigitsEncoder, step: int) -> None:
    layers = [statistics.fmean(heads) for heads in watch.measure(model, step)["entropy"]]
    run.entropy_steps.append(step)
    run.mean_entropy.append(statistics.fmean(layers))
    run.lowest_layer.append(min(layers))


def draw_runs(runs: list[Run], figure: "Figure") -> None:
    """Draw loss and entropy over the steps, a row for each architecture; one line a run."""
    architectures = list(dict.fromkeys(run.architecture for run in runs))
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
        entropy_axes.set(title=f"{architecture}: attention entropy (nats)", xlabel="step", ylim=(0, 3))
        for axes in (loss_axes, entropy_axes):
            axes.legend(fontsize="small")
