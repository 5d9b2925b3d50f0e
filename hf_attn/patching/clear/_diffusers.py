"""Errors for functions of diffusers that would undo CLEAR or lose its weights."""

import functools
import re
from types import ModuleType

from ..._import_hooks import when_imported
from .processors import ClearProcessor


def _change_pag(pag_utils: ModuleType) -> None:
    set_processors = pag_utils.PAGMixin._set_pag_attn_processor

    @functools.wraps(set_processors)
    def checked(self, pag_applied_layers, *args, **kwargs):
        model = getattr(self, "transformer", None) or self.unet
        local = [
            name
            for name, each in model.named_modules()
            if isinstance(getattr(each, "processor", None), ClearProcessor)
        ]
        taken = [name for name in local if any(re.search(layer, name) for layer in pag_applied_layers)]
        if taken:
            raise ValueError(
                f"Perturbed-attention guidance needs {', '.join(taken[:4])}, but CLEAR is applied to {len(taken)} "
                f"such layers. Call `remove_clear`, then apply_clear(..., exclude={taken[:4]})."
            )
        return set_processors(self, pag_applied_layers, *args, **kwargs)

    pag_utils.PAGMixin._set_pag_attn_processor = checked


def _change_ema(training_utils: ModuleType) -> None:
    save_pretrained = training_utils.EMAModel.save_pretrained

    @functools.wraps(save_pretrained)
    def checked(self, path):
        if self.model_cls is not None and self.model_config is not None:
            expected = [parameter.shape for parameter in self.model_cls.from_config(self.model_config).parameters()]
            if expected != [parameter.shape for parameter in self.shadow_params]:
                raise ValueError(
                    f"EMAModel has averages of {len(self.shadow_params)} parameters, but a saved "
                    f"{self.model_cls.__name__} has {len(expected)}: it does not include CLEAR's spatial weights. "
                    "Copy the averages into the transformer (`ema.copy_to(transformer.parameters())`) and save it "
                    "with save_clear_weights."
                )
        return save_pretrained(self, path)

    training_utils.EMAModel.save_pretrained = checked


when_imported("diffusers.pipelines.pag.pag_utils", _change_pag)
when_imported("diffusers.training_utils", _change_ema)
