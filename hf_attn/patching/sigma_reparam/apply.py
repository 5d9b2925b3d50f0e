"""Reparametrising the layers of any model, and folding them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patterns import NameFilter, Patterns
from .bypass import bypassed_layers, is_read
from .layers import REPARAMETRISED, SigmaReparamLayer, is_plain_weight, make_plain, reparametrise_layer
from .record import SigmaReparamLoading


@dataclass(frozen=True)
class SigmaReparamReport:
    """What [`apply_sigma_reparam`] did.

    Attributes:
        converted: names of the layers that were reparametrised.
        skipped: name of a linear layer that was not converted -> reason.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]


def apply_sigma_reparam(
    model: nn.Module,
    init: str = "preserve",
    include: Patterns = "*",
    exclude: Patterns = (),
    run: Callable[[nn.Module], Any] | None = None,
) -> SigmaReparamReport:
    """Reparametrise every linear layer and 2-D convolution of a model, in place.

    `save_pretrained` and `from_pretrained` of transformers keep the result. Libraries that rebuild a model without
    transformers (timm, diffusers) need this call before the weights are loaded, or a folded model.

    Args:
        model: any model of transformers, timm, diffusers or plain torch.
        init: `"preserve"` keeps the function (gamma = sigma(W)); `"unit"` starts every map at spectral norm 1, for
            training from scratch.
        include: pattern (as of `fnmatch`), or several, of the names of layers to convert.
        exclude: pattern or patterns of names to exclude.
        run: calls the model on a typical input and returns its output, such as `lambda model: model(**inputs)`. Layers
            whose weight the model turns out to read instead of calling them are left alone, see [`bypassed_layers`].
            Without it they are looked for in the source of the model's modules.

    Returns:
        Which layers were converted and which were not, with the reasons. Left alone are layers that share their weight with
        another module, whose weight is computed (weight_norm, spectral_norm, pruning) or read by the model instead of
        calling them, and subclasses that do not compute a plain linear map.

    Raises:
        ValueError: for an unknown `init`; if the model is reparametrised already, quantised or has adapters; if no layer
            is left to convert; or if a weight is all zero, which has no spectral norm.
    """
    if init not in ("preserve", "unit"):
        raise ValueError(f"init must be 'preserve' or 'unit', got {init!r}.")
    names = NameFilter(include, exclude)
    owners = _owners_of_weights(model)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has a PEFT adapter, whose matrices are not layers of the model. Reparametrise the model "
                "before adding adapters, or merge them first (`merge_and_unload`)."
            )
        if isinstance(module, SigmaReparamLayer):
            raise ValueError(f"{name or 'The module'} is already reparametrised. Call fold_sigma_reparam first.")
        if not isinstance(module, tuple(REPARAMETRISED)):
            continue
        if not is_plain_weight(module.weight):
            raise ValueError(
                f"{name} is quantised ({type(module.weight).__name__}, {module.weight.dtype}); reparametrise the "
                "model before quantising it, and fold it."
            )
        reason = names.reason_to_skip(name) or _reason_to_leave(model, name, module, owners)
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or nn.Conv2d to reparametrise"
            + (
                f" ({len(skipped)} were skipped: {_first(f'{name} {reason}' for name, reason in skipped.items())})."
                if skipped
                else "."
            )
        )
    zero = [name for name, module in chosen.items() if not module.weight.any()]
    if zero:
        raise ValueError(
            f"The weights of {_first(zero)} are all zero, so their spectral norm is zero. Name them in `exclude`, or "
            "reparametrise the model before they are set to zero."
        )
    for module in chosen.values():
        reparametrise_layer(module)
        module.reset_spectrum(init)
    _close_fast_paths(model)
    for name in () if run is None else bypassed_layers(model, run):
        make_plain(chosen.pop(name))
        skipped[name] = _READ
    _note_in_config(model, list(chosen) or None)
    return SigmaReparamReport(tuple(chosen), skipped)


_READ = "the model reads its weight without calling it"


def _owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Identity of each weight -> names of the modules that have it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return owners


def _reason_to_leave(model: nn.Module, name: str, module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    if type(module) not in REPARAMETRISED:
        return f"is a {type(module).__name__}"
    if "weight" not in module._parameters:
        return "its weight is computed, for example by weight_norm, spectral_norm or pruning"
    others = [other for other in owners[id(module.weight)] if other != name]
    if any(isinstance(model.get_submodule(other), nn.Embedding) for other in others):
        return "shares its weight with an embedding"
    if others:
        return f"shares its weight with {others[0]}"
    return _READ if is_read(model, name) else None


def _close_fast_paths(model: nn.Module) -> None:
    """Let torch's encoder call its layers in inference too, instead of handing their weights to a fused kernel."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor, module._has_closed_fast_path = False, True
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in module.children():
                if isinstance(layer, SigmaReparamLayer):
                    # torch checks only its presence.
                    layer.register_forward_pre_hook(_call_me)


def _open_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        if module.__dict__.pop("_has_closed_fast_path", False):
            module.use_nested_tensor = True
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _call_me:
                del module._forward_pre_hooks[key]


def _call_me(layer: nn.Module, args: tuple) -> None:
    """Forward pre-hook that changes nothing."""


def _note_in_config(model: nn.Module, layers: list[str] | None) -> None:
    """Record the converted layers where `from_pretrained` finds them, or remove the record."""
    if not hasattr(model, "config_class"):
        return
    if layers is None:
        model.config.__dict__.pop("quantization_config", None)
        if hasattr(model.config, "reparametrised"):  # a family that builds its layers itself
            model.config.reparametrised = False
        return
    model.config.quantization_config = SigmaReparamLoading(layers)


def refresh_sigma_reparam(model: nn.Module) -> tuple[str, ...]:
    """Recompute the tracked singular vectors u of all reparametrised layers, by singular value decompositions.

    For weights that did not come from training with u: averages of models (EMA, SWA), whose averaged u is not a singular vector of
    the averaged weight, or weights edited by hand.

    Returns:
        Names of the layers; none if no layer is reparametrised.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SigmaReparamLayer)}
    for layer in layers.values():
        layer.refresh_u()
    return tuple(layers)


def fold_sigma_reparam(model: nn.Module) -> tuple[str, ...]:
    """Turn every reparametrised layer into a plain one with weight W_hat, in place, with equal outputs in eval mode.

    Fold before quantising or exporting, and for inference at no extra cost.

    Returns:
        Names of the folded layers.

    Raises:
        ValueError: if no layer is reparametrised, as when a model is folded twice; or if two of them have been made to share
            a weight, which cannot be W_hat of both.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SigmaReparamLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no reparametrised layer: nothing to fold.")
    owners: dict[int, str] = {}
    for name, module in layers.items():
        other = owners.setdefault(id(module.weight), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} share a weight but have different gammas, so no folded weight fits both. Give "
                "one of them a copy of the weight: `layer.weight = nn.Parameter(layer.weight.detach().clone())`."
            )
    for module in layers.values():
        module.weight.data = module._frozen_effective_weight()
        make_plain(module)
    _open_fast_paths(model)
    _note_in_config(model, None)
    return tuple(layers)


def _first(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
