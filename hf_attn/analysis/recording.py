"""Recording the attention maps of a model that usually computes without them."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode with `attn_implementation="eager"`, which returns maps; restore both afterwards."""
    training = model.training
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    implementations = [(config, config._attn_implementation) for config in configs.values()]
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        model.train(training)
