"""SiFT, scale-invariant fine-tuning (arXiv 2006.03654): training that is robust to small changes of the input.

The input of the embeddings' LayerNorm is normalised first, so that a perturbation means the same for every word. One step
of gradient ascent looks for a perturbation that changes the prediction, and the loss asks the two predictions to agree:

    loss = task loss + sift_lambda * CE(p(y) || p(y')) + CE(p(y') || p(y))
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


EPS = 1e-7


def cross_entropy_to(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each row of predictions to the distribution of other ones, which gets no gradients, `(rows,)`."""
    return -(other.detach().float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)


def symmetric(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`CE(p_other, logits) + CE(p_logits, other)` of each row; both get gradients, each as the one that is scored."""
    return cross_entropy_to(logits, other) + cross_entropy_to(other, logits)


def squared_error(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared difference of each number, flattened."""
    return (logits.float() - other.float()).square().flatten()


_INNER_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "symmetric-kl": symmetric,
    "kl": cross_entropy_to,
    "mse": squared_error,
}


@dataclass
class SiFTStep:
    """Results of one step of [`sift_loss`].

    Attributes:
        loss: task loss plus weighted adversarial loss.
        task_loss: loss of the clean pass.
        adversarial_loss: disagreement of the clean and the perturbed predictions, mean over rows.
        outputs: of the clean pass.
        normalized: normalised input of the LayerNorm of the embeddings, `(batch, length, hidden_size)`.
        first_delta: perturbation that was drawn.
        gradient: of the summed inner loss with respect to it.
        delta: perturbation after the step of ascent.
        first_logits: predictions with the perturbation that was drawn.
        logits: predictions with the one after the step.
    """

    loss: torch.Tensor
    task_loss: torch.Tensor
    adversarial_loss: torch.Tensor
    outputs: object
    normalized: torch.Tensor
    first_delta: torch.Tensor
    gradient: torch.Tensor
    delta: torch.Tensor
    first_logits: torch.Tensor
    logits: torch.Tensor


def find_embedding_norm(model: nn.Module) -> nn.Module:
    """The LayerNorm of the word embeddings, before which SiFT acts.

    Raises:
        ValueError: if there is not exactly one `embeddings.LayerNorm`, as in DeBERTa, BERT and similar models.
    """
    found = [module for name, module in model.named_modules() if f".{name}".endswith(".embeddings.LayerNorm")]
    if len(found) != 1:
        raise ValueError(
            f"SiFT perturbs the input of `embeddings.LayerNorm`, but {type(model).__name__} has {len(found)} such "
            "modules. It supports DeBERTa, BERT and models with the same kind of embeddings."
        )
    return found[0]


@contextmanager
def _perturbed(norm: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    handle = norm.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def sift_loss(
    model: nn.Module,
    compute_clean: Callable[[], tuple[torch.Tensor, object]],
    compute_logits: Callable[[], torch.Tensor],
    *,
    sift_lambda: float,
    learning_rate: float = 1e-4,
    sigma: float = 1e-2,
    inner_loss: Literal["symmetric-kl", "kl", "mse"] = "symmetric-kl",
    is_regression: bool = False,
    first_delta: torch.Tensor | None = None,
) -> SiFTStep:
    """One step of SiFT; two forward passes and one backward pass to the embeddings more than the task alone.

    Args:
        model: model with an `embeddings.LayerNorm`; frozen parameters stay frozen.
        compute_clean: runs the model and returns the task loss and the outputs, which have `logits`.
        compute_logits: runs the model on the same batch and returns logits, one row for each prediction.
        sift_lambda: weight of the adversarial loss.
        learning_rate: largest change of a number by the step of ascent.
        sigma: standard deviation of the perturbation that is drawn; it is cut off at twice that.
        inner_loss: loss that the step of ascent increases. The adversarial loss is the symmetric one always, but for
            regression.
        is_regression: logits are numbers: both losses are squared errors.
        first_delta: perturbation to use in the place of a random one.
    """
    norm, seen = find_embedding_norm(model), []

    def normalize(states: torch.Tensor) -> torch.Tensor:
        seen.append(F.layer_norm(states, states.shape[-1:], eps=EPS))
        return seen[-1]

    with _perturbed(norm, normalize):
        task_loss, outputs = compute_clean()
    clean = outputs["logits"]
    clean = clean if is_regression else clean.flatten(0, -2)
    normalized = seen[0].detach()
    if first_delta is None:
        first_delta = torch.randn(normalized.shape, device=normalized.device) * sigma
        first_delta = first_delta.clamp(-2 * sigma, 2 * sigma)
    first_delta = first_delta.float().detach().requires_grad_()

    with _frozen(model), _perturbed(norm, lambda states: normalized + first_delta.to(normalized.dtype)):
        first_logits = compute_logits()
    inner = squared_error if is_regression else _INNER_LOSSES[inner_loss]
    gradient = torch.autograd.grad(inner(first_logits, clean.detach()).sum(), first_delta)[0]
    delta = first_delta.detach()
    if torch.isfinite(gradient.norm()):
        delta = delta + learning_rate * gradient / (gradient.abs().amax(-1, keepdim=True) + 1e-6)

    with _perturbed(norm, lambda states: normalized + delta.to(normalized.dtype)):
        logits = compute_logits()
    outer = squared_error if is_regression else symmetric
    adversarial = outer(logits, clean).mean()
    return SiFTStep(
        loss=task_loss + sift_lambda * adversarial,
        task_loss=task_loss,
        adversarial_loss=adversarial,
        outputs=outputs,
        normalized=normalized,
        first_delta=first_delta,
        gradient=gradient,
        delta=delta,
        first_logits=first_logits,
        logits=logits,
    )


class SiFTTrainerMixin:
    """Gives a Trainer scale-invariant fine-tuning; evaluation and prediction stay as they are.

        class SiFTTrainer(SiFTTrainerMixin, transformers.Trainer): ...

        SiFTTrainer(model, args, train_dataset=..., sift_lambda=5.0)

    It supports sequence classification, regression (one label) and token classification, whose positions with label -100 are
    left out. With `sift_lambda=0` training is the plain Trainer's. A step costs about three times that of the task alone.

    Args:
        sift_lambda: weight of the adversarial loss; 5 in the official scripts (3 for v3-xsmall).
        sift_learning_rate: largest change of a number by the step of ascent.
        sift_sigma: standard deviation of the perturbation that is drawn.
        sift_inner_loss: `"symmetric-kl"`, `"kl"` or `"mse"`: loss that the step of ascent increases.
    """

    def __init__(
        self,
        *args,
        sift_lambda: float = 5.0,
        sift_learning_rate: float = 1e-4,
        sift_sigma: float = 1e-2,
        sift_inner_loss: str = "symmetric-kl",
        **kwargs,
    ):
        if sift_inner_loss not in _INNER_LOSSES:
            raise ValueError(f"sift_inner_loss must be one of {', '.join(_INNER_LOSSES)}, got {sift_inner_loss!r}.")
        for name, value in {
            "sift_lambda": sift_lambda,
            "sift_learning_rate": sift_learning_rate,
            "sift_sigma": sift_sigma,
        }.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        super().__init__(*args, **kwargs)
        self.sift_lambda, self.sift_inner_loss = sift_lambda, sift_inner_loss
        self.sift_learning_rate, self.sift_sigma = sift_learning_rate, sift_sigma
        find_embedding_norm(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        """The loss of the task, in training with the adversarial one added."""
        clean = super().compute_loss

        def compute_clean():
            return clean(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs)

        if not self.sift_lambda or not model.training:
            loss, outputs = compute_clean()
            return (loss, outputs) if return_outputs else loss
        labels = inputs["labels"]
        is_regression = labels.is_floating_point() and self.model.config.num_labels == 1
        kept = labels != -100 if labels.ndim == 2 and not labels.is_floating_point() else None

        def rows(logits: torch.Tensor) -> torch.Tensor:
            return logits if is_regression else (logits if kept is None else logits[kept])

        def compute_clean_rows():
            loss, outputs = compute_clean()
            self._clean_outputs = outputs
            return loss, {"logits": rows(outputs["logits"])}

        # DistributedDataParallel expects the gradients of what its last call uses, and only the clean pass uses all.
        perturbed = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        features = {name: value for name, value in inputs.items() if name != "labels"}
        step = sift_loss(
            model,
            compute_clean_rows,
            lambda: rows(perturbed(**features)["logits"]),
            sift_lambda=self.sift_lambda,
            learning_rate=self.sift_learning_rate,
            sigma=self.sift_sigma,
            inner_loss=self.sift_inner_loss,
            is_regression=is_regression,
        )
        outputs, self._clean_outputs = self._clean_outputs, None
        return (step.loss, outputs) if return_outputs else step.loss
