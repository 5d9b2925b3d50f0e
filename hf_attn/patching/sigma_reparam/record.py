"""The record in a model's configuration of which layers are reparametrised."""

from transformers.utils.quantization_config import QuantizationConfigMixin


METHOD = "sigma_reparam"


class SigmaReparamLoading(QuantizationConfigMixin):
    """Which layers of a saved model are reparametrised, or how to reparametrise a plain one while it is loaded.

    Args:
        layers: names of the reparametrised layers of a saved model.
        init: for a plain checkpoint, see [`apply_sigma_reparam`].
    """

    def __init__(self, layers: list[str] | None = None, init: str = "preserve", quant_method: str = METHOD):
        self.quant_method = quant_method
        self.layers = layers
        self.init = init
