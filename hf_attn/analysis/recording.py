"""Recording the attention maps of a model that usually computes without them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from transformers import PreTrainedModel


def eager_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Put a model in eval mode with `attn_implementation="eager"`, which returns maps; restore both afterwards."""
    return attention_implementation(model, "eager")


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Put a model in eval mode with an attention implementation; restore both afterwards."""
    training = model.training
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    implementations = [(config, config._attn_implementation) for config in configs.values()]
    model.eval()
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        model.train(training)
