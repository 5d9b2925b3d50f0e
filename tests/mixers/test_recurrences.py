"""The linear forms of cumulative softmax and of Taylor attention against their maps."""

import pytest
import torch

from hf_attn.mixers.cumulative_softmax import LOWEST, cumulative_softmax, cumulative_softmax_weights
from hf_attn.mixers.taylor import JOINT, PER_ORDER, taylor_attention, taylor_weights


TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return (torch.randn(shape, generator=generator) * scale).requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 29])
@pytest.mark.parametrize("scale", [1.0, 2000.0])
def test_cumulative_softmax(length, scale):
    scores, values = drawn(2, 3, length, scale=scale), drawn(2, 3, length, 5)
    expected = cumulative_softmax_weights(scores) @ values
    probe = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    gradients = torch.autograd.grad((expected * probe).sum(), (scores, values))
    output, state = cumulative_softmax(scores, values, chunk=8)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    for found, wanted in zip(torch.autograd.grad((output * probe).sum(), (scores, values)), gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

    steps, kept = [], None
    for token in range(length):
        part, kept = cumulative_softmax(scores[..., token : token + 1], values[..., token : token + 1, :], kept)
        steps.append(part)
    torch.testing.assert_close(torch.cat(steps, -2), expected, **TOLERANCE)
    for name in state:
        torch.testing.assert_close(kept[name], state[name], **TOLERANCE)


def test_cumulative_softmax_forgets_padding():
    scores, values = drawn(1, 2, 9).detach(), drawn(1, 2, 9, 5).detach()
    padded = torch.cat((torch.full((1, 2, 4), LOWEST), scores), -1)
    filled = torch.cat((torch.full((1, 2, 4, 5), 3.0), values), -2)
    torch.testing.assert_close(
        cumulative_softmax(padded, filled, chunk=3)[0][..., 4:, :], cumulative_softmax(scores, values)[0]
    )


@pytest.mark.parametrize("terms", [JOINT, PER_ORDER], ids=["joint", "per_order"])
def test_taylor(terms):
    # positive queries and keys keep the per-order denominators away from 0
    query, key = (drawn(2, 3, 11, size).detach()[..., :4].abs().requires_grad_() for size in (4, 5))
    value = drawn(2, 3, 11, 6)
    maps = taylor_weights(query, key, terms)
    assert len(maps) == len(terms)
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 11))
    expected = sum(maps) @ value
    output, nothing = taylor_attention(query, key, value, terms, chunk=4)
    assert nothing is None
    torch.testing.assert_close(output, expected, **TOLERANCE)
    for found, wanted in zip(
        torch.autograd.grad(output.square().sum(), (query, key, value)),
        torch.autograd.grad(expected.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    steps, sums = [], None
    for token in range(11):
        part = slice(token, token + 1)
        step, sums = taylor_attention(
            query[..., part, :], key[..., part, :], value[..., part, :], terms, sums=sums, keep_sums=True
        )
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, -2), expected, **TOLERANCE)


def test_taylor_is_softmax_for_small_scores():
    query, key = drawn(1, 1, 12, 4).detach(), drawn(1, 1, 12, 5).detach()[..., :4]
    causal = torch.ones(12, 12, dtype=torch.bool).tril()

    def error(scale):
        scores = (query * scale) @ key.transpose(-1, -2)
        softmax = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return (taylor_weights(query * scale, key)[0] - softmax).abs().max().item()

    assert error(0.05) < error(0.1) / 6  # third order: an eighth
