"""Entropy of attention and its lower bound."""

import math

import pytest
import torch

from hf_attn.analysis.entropy import attention_entropy, entropy_lower_bound


@pytest.mark.parametrize("num_keys", [2, 7, 100])
@pytest.mark.parametrize("norm", [0.0, 0.5, 3.0, 12.0])
def test_bound_is_attained_by_one_large_logit(num_keys, norm):
    logits = torch.full((num_keys,), -norm / math.sqrt(num_keys * (num_keys - 1)), dtype=torch.float64)
    logits[0] = norm * math.sqrt((num_keys - 1) / num_keys)
    assert logits.norm().item() == pytest.approx(norm, abs=1e-12)
    bound = entropy_lower_bound(torch.tensor(norm, dtype=torch.float64), num_keys)
    assert attention_entropy(logits.softmax(-1)).item() == pytest.approx(bound.item(), abs=1e-9)


def test_bound_is_never_violated():
    torch.manual_seed(0)
    logits = torch.randn(2000, 9, dtype=torch.float64) * torch.logspace(-2, 1.5, 2000, dtype=torch.float64)[:, None]
    bound = entropy_lower_bound(logits.norm(dim=-1), 9)
    assert (attention_entropy(logits.softmax(-1)) >= bound - 1e-12).all()


def test_uniform_and_single_key():
    assert entropy_lower_bound(0.0, 50).item() == pytest.approx(math.log(50))
    assert entropy_lower_bound(4.0, 1).item() == 0
    assert attention_entropy(torch.full((3, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 3)
    assert attention_entropy(torch.tensor([[0.0, 1.0]])).item() == 0
