"""Lets ``from_pretrained`` load a reparametrised model of any transformers class.

transformers has one public way to change the modules of a model before its weights are loaded, the quantizers; nothing is
quantised here. :func:`apply_sigma_reparam` notes the converted layers in the model's configuration under
``quantization_config``, with the method ``sigma_reparam``.
"""

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers import apply_sigma_reparam, fold_sigma_reparam, reparametrise_layer


METHOD = "sigma_reparam"


class SigmaReparamLoading(QuantizationConfigMixin):
    """Which layers of a saved model are reparametrised, or how to reparametrise a plain one while it is loaded.

    Args:
        layers: names of the reparametrised layers of a saved model.
        init: for a plain checkpoint, see :func:`apply_sigma_reparam`.
    """

    def __init__(self, layers: list[str] | None = None, init: str = "preserve", quant_method: str = METHOD):
        self.quant_method = quant_method
        self.layers = layers
        self.init = init


class SigmaReparamLoader(HfQuantizer):
    """Reparametrises the layers named in the configuration before their weights are loaded."""

    is_qat_trainable = True
    is_compileable = True
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            for name in self.quantization_config.layers:
                reparametrise_layer(model.get_submodule(name))

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            apply_sigma_reparam(model, init=self.quantization_config.init)
        return model

    def _dequantize(self, model, dtype=None):
        fold_sigma_reparam(model)
        return model
