"""The blockwise path of landmark attention against its specification."""

from dataclasses import replace

import pytest
import torch

from hf_attn.attention.landmark import LANDMARK, grouped_softmax
from hf_attn.kernels.landmark.blockwise import landmark_attention_blockwise
from hf_attn.kernels.landmark.call import LandmarkCall, check_blockwise


def make_call(q_len=23, kv_len=23, block=5, mask=None, kv_heads=2, dtype=torch.float32) -> LandmarkCall:
    torch.manual_seed(0)
    query = torch.randn(2, 4, q_len, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, kv_len, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    is_landmark = (torch.arange(kv_len) % block == block - 1).expand(2, -1)
    arguments = {"scaling": 0.35, "is_landmark": is_landmark, "is_causal": True}
    if mask is not None:
        allowed = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        if mask == "padding":
            allowed[0, ..., :7], allowed[1, ..., -4:] = False, False
        else:
            allowed &= torch.rand(allowed.shape) < 0.6
        arguments |= {"attention_mask": allowed, "is_causal": False}
    return LandmarkCall(query, key, value, **arguments)


def inputs_of(call: LandmarkCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return call.query, call.key, call.value


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"kv_heads": 4},
        {"kv_len": 25, "q_len": 25},
        {"q_len": 7},
        {"q_len": 1},
        {"block": 2},
        {"block": 64},
        {"mask": "padding"},
        {"mask": "holes"},
        {"mask": "padding", "q_len": 9},
    ],
    ids=str,
)
def test_equals_the_specification(call):
    call = make_call(**call)
    results = []
    for name in ("landmark_torch", "landmark_eager"):
        output, _ = LANDMARK(call, name)
        torch.manual_seed(1)
        results.append([output, *torch.autograd.grad(output, inputs_of(call), torch.randn(output.shape))])
    for name, ours, expected in zip(("output", "query", "key", "value"), *results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_memory_is_linear_in_the_length():
    """At 2 heads and 4096 tokens the weights alone would be 128 MiB; forward and backward never hold a tenth of that."""
    query, key, value = (torch.randn(1, 2, 4096, 8, requires_grad=True) for _ in range(3))
    is_landmark = (torch.arange(4096) % 64 == 63)[None]
    with torch.profiler.profile(profile_memory=True) as profile:
        call = LandmarkCall(query, key, value, scaling=0.3, is_landmark=is_landmark, is_causal=True)
        landmark_attention_blockwise(call, 64).sum().backward()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2**20 < peak < 13 * 2**20


def test_reasons():
    call = make_call()
    assert check_blockwise(call) == 5

    def reason(**changes):
        return check_blockwise(replace(call, block_size=None, **changes)).reason

    irregular = call.is_landmark.clone()
    irregular[1] = irregular[1].roll(1)
    assert "ends of blocks of one size" in reason(is_landmark=irregular)
    assert "ends of blocks of one size" in reason(is_landmark=torch.ones(2, 23, dtype=torch.bool))
    assert "must have the shape (2, 23), got (2, 9)" in reason(is_landmark=torch.zeros(2, 9, dtype=torch.bool))
    assert "allows later keys" in reason(attention_mask=torch.ones(2, 1, 23, 23, dtype=torch.bool), is_causal=False)
    assert "additive" in reason(attention_mask=torch.zeros(2, 1, 23, 23))
    assert "it is causal, but the call is not" in reason(is_causal=False)
    assert "dropout=0.1" in reason(dropout=0.1)
    assert "weights" in reason(output_weights=True)
    assert "sliding window" in reason(sliding_window=4)


# --- facts of the specification --------------------------------------------------------------------------------------


def facts():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 200, 200, dtype=torch.float64)
    return scores, torch.ones(200, 200, dtype=torch.bool).tril()


def test_any_number_of_landmarks():
    """The official function fails from 64 on."""
    scores, causal = facts()
    is_landmark = (torch.arange(200) % 2 == 1)[None]
    weights = grouped_softmax(scores, is_landmark, causal)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 200, dtype=torch.float64))
    assert (weights[..., 1::2] == 0).all()


def test_only_differences_within_a_group_count():
    scores, causal = facts()
    is_landmark = (torch.arange(200) % 20 == 19)[None]
    expected = grouped_softmax(scores, is_landmark, causal)[:, :, -1]
    regular = scores.clone()
    regular[..., 40:59] += 7  # the regular tokens of one earlier block
    torch.testing.assert_close(grouped_softmax(regular, is_landmark, causal)[:, :, -1], expected)
    own = scores.clone()
    own[..., 180:] += 7  # the own block ...
    assert not torch.allclose(grouped_softmax(own, is_landmark, causal)[:, :, -1], expected)
    own[..., is_landmark[0] & (torch.arange(200) < 180)] += 7  # ... and every gate
    torch.testing.assert_close(grouped_softmax(own, is_landmark, causal)[:, :, -1], expected)


def test_a_landmark_attends_as_the_token_before_it_would():
    scores, causal = facts()
    is_landmark = (torch.arange(200) % 20 == 19)[None]
    scores[:, :, 99] = scores[:, :, 98]
    weights = grouped_softmax(scores, is_landmark, causal)
    torch.testing.assert_close(weights[:, :, 99], weights[:, :, 98])


def test_an_empty_block_takes_its_share():
    scores, causal = facts()
    is_landmark = torch.zeros(1, 200, dtype=torch.bool)
    is_landmark[0, [5, 6]] = True
    sums = grouped_softmax(scores, is_landmark, causal).sum(-1)
    torch.testing.assert_close(sums[..., :7], torch.ones_like(sums[..., :7]))
    assert (sums[..., 7:] < 1).all()
