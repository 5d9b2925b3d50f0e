"""sigma-reparametrisation (arXiv 2303.06296) of any model, in place: :func:`apply_sigma_reparam`, :func:`fold_sigma_reparam`."""

from .layers import (
    SigmaReparamConv2d,
    SigmaReparamLayer,
    SigmaReparamLinear,
    SigmaReparamReport,
    apply_sigma_reparam,
    fold_sigma_reparam,
    power_iteration,
    reparametrise_layer,
)


__all__ = [
    "SigmaReparamConv2d",
    "SigmaReparamLayer",
    "SigmaReparamLinear",
    "SigmaReparamReport",
    "apply_sigma_reparam",
    "fold_sigma_reparam",
    "power_iteration",
    "reparametrise_layer",
]
