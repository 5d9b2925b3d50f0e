"""Tolerances of implementations, measured from the reference implementation instead of chosen by hand."""

import torch

from hf_attn.attention.conformance import inexact


def assert_as_exact(computed: torch.Tensor, specification: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """See [`hf_attn.attention.conformance.inexact`]."""
    assert not (report := inexact(computed, [specification], exact, what)), report
