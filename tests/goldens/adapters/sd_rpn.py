"""SD-RPN."""

import torch

from ..case import Case
from .sd_rpn_labels import run_labels


def run(case: Case) -> dict[str, torch.Tensor]:
    results = run_labels(case)
    if results is None:
        raise LookupError(f"There is no adapter for {case.entry!r}.")
    return results
