"""Which of the registered names can be run on this machine."""

import pytest
import torch

from hf_attn.attention import MECHANISMS
from hf_attn.attention.interface import Mechanism


def mechanism_of(name: str) -> Mechanism:
    return next(mechanism for mechanism in MECHANISMS if name in mechanism.names)


@pytest.fixture
def sigmoid_name(request) -> str:
    """A name of sigmoid attention; the test is skipped, with the reason, where its kernel cannot run at all."""
    name = request.param
    pinned = [i for i in mechanism_of(name).implementations if name.endswith(f"_{i.backend}")]
    tensor = torch.zeros(1, 1, 4, 16)
    arguments = {"scaling": 1.0, "bias": 0.0, "attention_mask": None, "is_causal": True, "sliding_window": None}
    for implementation in pinned:
        ok, reason = implementation.supports(tensor, tensor, tensor, **arguments, dropout=0.0, output_weights=False)
        if not ok:
            pytest.skip(f"{name}: {reason}")
    return name
