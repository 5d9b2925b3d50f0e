"""How much the outputs of a classifier change when part of its attention is removed."""

import math

import torch


#: metrics that need no labels, of logits
LABEL_FREE_METRICS = ("prob_drop", "abs_prob_change", "jsd", "kl", "flip_rate")
#: metrics that compare with the true class
LABEL_METRICS = ("label_prob_drop", "ce_increase", "accuracy_drop")
#: metrics of the representation after the final norm
CLASS_TOKEN_METRICS = ("cls_cosine", "cls_l2")
METRICS = (*LABEL_FREE_METRICS, *LABEL_METRICS, *CLASS_TOKEN_METRICS)


def prediction_change(
    full_logits: torch.Tensor, pruned_logits: torch.Tensor, labels: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What pruning does to the predictions, image by image; an importance is the mean over the images.

    With p and q the soft-max of the full and of the pruned logits, c = argmax p and y the label:
    `prob_drop` is p_c - q_c, `abs_prob_change` its absolute value, `jsd` and `kl` are the Jensen-Shannon divergence (at most
    ln 2) and KL(p, q), `flip_rate` is 1 where the prediction changes; with labels, `label_prob_drop` is p_y - q_y,
    `ce_increase` ln p_y - ln q_y and `accuracy_drop` [c = y] - [argmax q = y]. All logarithms are natural.

    Args:
        full_logits: `(images, classes)`.
        pruned_logits: `(..., images, classes)`.
        labels: `(images,)` class indices.

    Returns:
        Metric -> `(..., images)`, in float64 where the device has it.

    Raises:
        ValueError: for shapes that do not fit, or a label that is not a class.
    """
    if full_logits.dim() != 2 or pruned_logits.shape[-2:] != full_logits.shape:
        raise ValueError(
            "full_logits must have the shape (images, classes) and pruned_logits (..., images, classes); got "
            f"{tuple(full_logits.shape)} and {tuple(pruned_logits.shape)}."
        )
    log_p, log_q = (_precise(logits).log_softmax(-1) for logits in (full_logits, pruned_logits))
    predicted = log_p.argmax(-1)
    flipped = log_q.argmax(-1) != predicted
    drop = _pick(log_p, predicted).exp() - _pick(log_q, predicted).exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    changes = {
        "prob_drop": drop,
        "abs_prob_change": drop.abs(),
        "jsd": (_divergence(log_p, log_m) + _divergence(log_q, log_m)) / 2,
        "kl": _divergence(log_p, log_q),
        "flip_rate": flipped.to(log_p.dtype),
    }
    if labels is not None:
        check_labels(labels, *full_logits.shape)
        labels = labels.to(log_p.device)
        label_p, label_q = _pick(log_p, labels), _pick(log_q, labels)
        right, still_right = predicted == labels, log_q.argmax(-1) == labels
        changes["label_prob_drop"] = label_p.exp() - label_q.exp()
        changes["ce_increase"] = label_p - label_q
        changes["accuracy_drop"] = right.to(log_p.dtype) - still_right.to(log_p.dtype)
    return changes


def representation_change(full: torch.Tensor, pruned: torch.Tensor) -> dict[str, torch.Tensor]:
    """What pruning does to the class token after the final norm, image by image.

    Args:
        full: `(images, width)`.
        pruned: `(..., images, width)`.

    Returns:
        `cls_cosine`, 1 - cos, and `cls_l2`, the distance, each `(..., images)`.
    """
    full, pruned = _precise(full), _precise(pruned)
    return {
        "cls_cosine": 1 - torch.nn.functional.cosine_similarity(full.expand_as(pruned), pruned, dim=-1),
        "cls_l2": (full - pruned).norm(dim=-1),
    }


def check_labels(labels: torch.Tensor, images: int, classes: int) -> None:
    """Raise `ValueError` unless there is a class index for each image."""
    if labels.shape != (images,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be one class index for each of the {images} images, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ValueError(f"Label {outside[0].item()} is out of range: the model has {classes} classes.")


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _pick(log_probabilities: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.expand(log_probabilities.shape[:-1])
    return log_probabilities.gather(-1, index[..., None])[..., 0]


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    # 0 ln 0 = 0, also where both are -inf
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
