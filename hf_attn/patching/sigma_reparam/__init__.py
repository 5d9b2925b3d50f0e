"""sigma-reparametrisation (arXiv 2303.06296) of any model, in place: [`apply_sigma_reparam`], [`fold_sigma_reparam`]."""

from . import _other_libraries  # noqa: F401 (imported for what it does)
from .apply import SigmaReparamReport, apply_sigma_reparam, fold_sigma_reparam, refresh_sigma_reparam
from .bypass import bypassed_layers
from .layers import (
    SigmaReparamConv2d,
    SigmaReparamLayer,
    SigmaReparamLinear,
    power_iteration,
    reparametrise_layer,
)


__all__ = [
    "SigmaReparamConv2d",
    "SigmaReparamLayer",
    "SigmaReparamLinear",
    "SigmaReparamReport",
    "apply_sigma_reparam",
    "bypassed_layers",
    "fold_sigma_reparam",
    "power_iteration",
    "refresh_sigma_reparam",
    "reparametrise_layer",
]
