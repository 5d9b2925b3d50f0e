"""Pipelines answer with trained heads only."""

from transformers import PreTrainedModel


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose head is random because its weights were saved without one.

    Raises:
        ValueError: if the configuration, which names the class that was saved, names a base model.
    """
    name = type(model).__name__
    saved = model.config.architectures or []
    if saved and name not in saved and all(other.endswith("Model") for other in saved):
        raise ValueError(
            f"The weights are those of a {', '.join(saved)}, which has no head, so the head of this {name} would be "
            f"random. Train it and save the {name} with `save_pretrained`, or use a model that was saved with its "
            "head."
        )
