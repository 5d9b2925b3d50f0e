"""Operations of PEFT and quantisers on a layer's `weight`: they apply to W_hat, or raise an error."""

import functools
from collections.abc import Callable
from types import ModuleType

from torch import nn

from ..._import_hooks import when_imported
from .layers import SigmaReparamLayer
from .record import METHOD


def _refuse(what: str) -> None:
    raise ValueError(
        f"{what} would compute with the weight W of a sigma-reparametrised layer instead of gamma * W / sigma(W). Call "
        "fold_sigma_reparam(model) first; the folded layers are plain ones."
    )


# --- PEFT ------------------------------------------------------------------------------------------------------------

#: adapters that add to the output, scale it, or rotate the input, and change the weight only when merged
_ADDITIVE = {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT"}
#: values of `init_lora_weights` that do not change the weight of the layer
_LORA_INITS = (True, False, "gaussian", "orthogonal")
#: options of LoRA that do not make it compute with the weight of the layer
_LORA_OPTIONS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}


def _unsupported(config) -> str | None:
    """The setting with which an adapter computes with the weight of the layer."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _ADDITIVE:
        return kind
    if kind == "LORA":
        if config.init_lora_weights not in _LORA_INITS:
            return f"LoRA with init_lora_weights={config.init_lora_weights!r}"
        default = type(config)()
        for name, value in vars(config).items():
            if name not in _LORA_OPTIONS and value and value != getattr(default, name, None):
                return f"LoRA with {name}={value!r}"
    return None


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _checked(create: Callable) -> Callable:
    """`_create_and_replace` of a tuner that refuses adapters which are wrong on W."""

    @functools.wraps(create)
    def wrapper(self, peft_config, adapter_name, target, *args, **kwargs):
        if isinstance(_base_layer(target), SigmaReparamLayer) and (what := _unsupported(peft_config)):
            _refuse(f"The adapter {what}")
        return create(self, peft_config, adapter_name, target, *args, **kwargs)

    return wrapper


def _around_plain_weight(method: Callable) -> Callable:
    """`merge` or `unmerge` of an adapter layer, on W_hat."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        base_layer = self.get_base_layer()
        if not isinstance(base_layer, SigmaReparamLayer):
            return method(self, *args, **kwargs)
        with base_layer.plain_weight():
            return method(self, *args, **kwargs)

    return wrapper


def _decorate_methods(base: type, decorators: dict[str, Callable]) -> None:
    """Decorate methods of all subclasses of a class, those that there are and those that will be defined."""

    def decorate(cls: type) -> None:
        for name, decorator in decorators.items():
            if name in vars(cls) and not hasattr(vars(cls)[name], "__wrapped__"):
                setattr(cls, name, decorator(vars(cls)[name]))

    inherited = base.__init_subclass__

    def init_subclass(cls, **kwargs):
        inherited(**kwargs)
        decorate(cls)

    base.__init_subclass__ = classmethod(init_subclass)
    waiting = [*base.__subclasses__()]
    while waiting:
        cls = waiting.pop()
        decorate(cls)
        waiting += cls.__subclasses__()


def _change_peft(tuners_utils: ModuleType) -> None:
    _decorate_methods(tuners_utils.BaseTuner, {"_create_and_replace": _checked})
    _decorate_methods(tuners_utils.BaseTunerLayer, {"merge": _around_plain_weight, "unmerge": _around_plain_weight})


when_imported("peft.tuners.tuners_utils", _change_peft)


# --- quantisers ------------------------------------------------------------------------------------------------------


def _change_quanto(qmodule: ModuleType) -> None:
    from_module = qmodule.QModuleMixin.from_module.__func__

    @functools.wraps(from_module)
    def checked(cls, module, *args, **kwargs):
        if isinstance(module, SigmaReparamLayer):
            _refuse("quanto")
        return from_module(cls, module, *args, **kwargs)

    qmodule.QModuleMixin.from_module = classmethod(checked)


def _change_torch_ao(quantize: ModuleType) -> None:
    swap_module = quantize.swap_module

    @functools.wraps(swap_module)
    def checked(mod, mapping, *args, **kwargs):
        # It checks the exact class, and would silently keep the layer in full precision.
        if isinstance(mod, SigmaReparamLayer) and any(cls in mapping for cls in type(mod).__mro__):
            _refuse("torch.ao")
        return swap_module(mod, mapping, *args, **kwargs)

    quantize.swap_module = checked


def _change_transformers(auto: ModuleType) -> None:
    merge = auto.AutoHfQuantizer.merge_quantization_configs

    def checked(quantization_config, quantization_config_from_args):
        given = quantization_config_from_args
        stored = quantization_config
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if method == METHOD and given is not None and given.quant_method != METHOD:
            _refuse(f"The checkpoint is sigma-reparametrised, and quantising it with {type(given).__name__}")
        return merge(stored, given)

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(checked)


when_imported("optimum.quanto.nn.qmodule", _change_quanto)
when_imported("torch.ao.quantization.quantize", _change_torch_ao)
when_imported("transformers.quantizers.auto", _change_transformers)
