"""How exact an implementation has to be: measured against its specification, not picked."""

import torch

from hf_attn.attention.conformance import inexact


def assert_as_exact(computed: torch.Tensor, specification: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """See :func:`hf_attn.attention.conformance.inexact`."""
    assert not (report := inexact(computed, [specification], exact, what)), report
