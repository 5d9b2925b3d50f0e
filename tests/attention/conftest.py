"""Registered names that can run on this machine."""

import pytest
import torch

from hf_attn.attention import MECHANISMS, Mechanism, Refusal


def mechanism_of(name: str) -> Mechanism:
    return next(mechanism for mechanism in MECHANISMS if name in mechanism.names)


@pytest.fixture
def sigmoid_name(request) -> str:
    """A name of sigmoid attention; the test is skipped, with the reason, where its kernel cannot run at all."""
    name = request.param
    tensor = torch.zeros(1, 1, 4, 16)
    mechanism = mechanism_of(name)
    for implementation in mechanism.implementations:
        refusal = implementation.check(mechanism.call(tensor, tensor, tensor, is_causal=True))
        if mechanism.name_of(implementation) == name and isinstance(refusal, Refusal):
            pytest.skip(f"{name}: {refusal.reason}")
    return name
