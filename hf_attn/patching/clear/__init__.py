"""CLEAR (arXiv 2412.16112) on the diffusion transformers of diffusers, in place: [`apply_clear`], [`remove_clear`]."""

from . import _diffusers  # noqa: F401 (imported for what it does)
from .patch import ClearReport, apply_clear, clear_processors, raster_grid, remove_clear


__all__ = ["ClearReport", "apply_clear", "clear_processors", "raster_grid", "remove_clear"]
