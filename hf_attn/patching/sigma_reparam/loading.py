"""Lets `from_pretrained` load a reparametrised model of any transformers class.

transformers has one public way to change the modules of a model before its weights are loaded, the quantizers; nothing is
quantised here. [`apply_sigma_reparam`] notes the converted layers in the model's configuration under
`quantization_config`, with the method `sigma_reparam`.
"""

from typing import TYPE_CHECKING

from torch import nn
from transformers.quantizers.base import HfQuantizer

from .apply import apply_sigma_reparam, fold_sigma_reparam
from .layers import REPARAMETRISED, reparametrise_layer
from .record import METHOD, SigmaReparamLoading


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHOD", "SigmaReparamLoader", "SigmaReparamLoading"]


class SigmaReparamLoader(HfQuantizer):
    """Reparametrises the layers named in the configuration before their weights are loaded."""

    is_qat_trainable = True
    is_compileable = True
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            return
        layers = _layers_in(model, self.quantization_config.layers)
        for layer in layers.values():
            reparametrise_layer(layer)
        self.quantization_config.layers = list(layers)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            apply_sigma_reparam(model, init=self.quantization_config.init)
        else:
            for name in self.quantization_config.layers:
                layer = model.get_submodule(name)
                # transformers marks what it has loaded. A weight of another size is new, while the saved u may fit.
                if not getattr(layer.weight, "_is_hf_initialized", False):
                    layer.refresh_u()
        return model

    def _dequantize(self, model, dtype=None):
        fold_sigma_reparam(model)
        return model


def _layers_in(model: "PreTrainedModel", names: list[str]) -> dict[str, nn.Module]:
    """The layers of a saved model in one of another class, which may have other heads, or none.

    Args:
        model: the model that is loaded.
        names: of layers in the model that was saved, with the prefix of the base model or without.

    Returns:
        Name in the model -> layer.

    Raises:
        ValueError: if there is none.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if type(modules.get(candidate)) in REPARAMETRISED:
                found[candidate] = modules[candidate]
                break
    if not found:
        raise ValueError(
            f"The checkpoint is sigma-reparametrised, but {type(model).__name__} has none of its {len(names)} "
            f"reparametrised layers, such as {names[0]}. Load it with the class with which it was saved, call "
            "fold_sigma_reparam, and save it again."
        )
    return found
