"""Combiner attention: properties from the paper, sequences in masks, and unsupported calls."""

import pytest
import torch
from torch.nn import functional as F

from hf_attn.attention.combiner import COMBINERS, combiner_probabilities
from hf_attn.kernels.combiner.call import CombinerCall
from hf_attn.kernels.combiner.plan import BIDIRECTIONAL_KINDS, KINDS, ROWMAJOR, make_plan


CAUSAL = (*KINDS, ROWMAJOR)
FORMS = [(kind, True) for kind in CAUSAL] + [(kind, False) for kind in BIDIRECTIONAL_KINDS]


def make_call(
    kind: str, length: int, segment_length: int, is_causal: bool = True, heads=(2, 2), **fields
) -> CombinerCall:
    torch.manual_seed(0)
    query = torch.randn(1, heads[0], length, 8, dtype=torch.float64)
    key, value = (torch.randn(1, heads[1], length, 8, dtype=torch.float64) for _ in range(2))
    if kind == ROWMAJOR:
        fields |= {"row_key": lambda output, row_input: 2 * output, "row_input": torch.zeros(1, length, 1)}
    return CombinerCall(query, key, value, kind=kind, segment_length=segment_length, is_causal=is_causal, **fields)


def softmax_attention(call: CombinerCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=call.is_causal)


def run(call: CombinerCall, implementation: str) -> torch.Tensor:
    mechanism = COMBINERS[call.kind]
    return mechanism(call, f"{mechanism.name}_{implementation}")[0]


@pytest.mark.parametrize("implementation", ["eager", "torch"])
@pytest.mark.parametrize(
    ("kind", "length", "segment_length", "is_causal"),
    [
        ("fixed", 9, 9, True),
        ("fixed", 9, 20, False),
        ("fixed", 9, 1, True),
        ("fixed", 9, 1, False),
        ("logsparse", 2, 4, True),
        ("vertical", 10, 5, True),
        ("horizontal", 10, 2, True),
        ("horizontal", 10, 1, True),
        ("rowmajor", 6, 6, True),
        ("mixture", 6, 6, True),
        ("mixture", 6, 1, True),
    ],
)
def test_is_softmax_attention_in_the_limits(implementation, kind, length, segment_length, is_causal):
    call = make_call(kind, length, segment_length, is_causal)
    torch.testing.assert_close(run(call, implementation), softmax_attention(call))


def test_two_rows_of_the_mixture_are_not_softmax_attention():
    call = make_call("mixture", 8, 4)
    assert not torch.allclose(run(call, "eager"), softmax_attention(call), atol=1e-3)


@pytest.mark.parametrize(("kind", "is_causal"), FORMS)
@pytest.mark.parametrize("length", [9, 17, 24])
def test_every_allowed_token_has_a_weight(kind, is_causal, length):
    """Rows sum to 1, are positive on all allowed tokens and zero on the future; 9 and 17 break the official `logsparse`."""
    weights = COMBINERS[kind](make_call(kind, length, 4, is_causal), f"combiner_{kind}_eager")[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if is_causal else allowed
    assert bool((weights[..., allowed] > 0).all())
    assert bool((weights[..., ~allowed] == 0).all())


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("implementation", ["eager", "torch"])
def test_an_output_depends_on_all_earlier_tokens_and_on_no_later_one(kind, implementation):
    call = make_call(kind, 17, 4)
    states = torch.cat((call.query, call.key, call.value), dim=-1).requires_grad_()

    def output(states):
        call.query, call.key, call.value = states.split(8, dim=-1)
        return run(call, implementation).sum((0, 1, 3))

    depends = torch.autograd.functional.jacobian(output, states).abs().sum((1, 2, 4)) > 0
    assert depends.tolist() == torch.ones(17, 17).tril().bool().tolist()


def test_the_weights_on_an_earlier_segment_have_rank_one():
    call = make_call("fixed", 12, 4)
    weights = COMBINERS["fixed"](call, "combiner_fixed_eager")[1][0, 0]
    assert torch.linalg.matrix_rank(weights[8:12, 0:4], atol=1e-9) == 1
    assert torch.linalg.matrix_rank(weights[8:12, 8:12], atol=1e-9) == 4


def test_numbers_of_the_cards_terms():
    """1024 tokens: 32,768 scores of `fixed` with 32 segments, 6,144 of `logsparse`, 524,800 of softmax attention."""
    for kind, expected in (("fixed", 32768), ("logsparse", 6144)):
        plan = make_plan(kind, 1024, 32, is_causal=True)
        assert int(plan.direct.sum() + plan.uses.sum()) == expected


def test_direct_tokens_and_spans_share_one_softmax():
    direct, spans, inside = combiner_probabilities(make_call("fixed", 12, 4))
    joint = direct.sum(-1) + spans.sum(-1)
    torch.testing.assert_close(joint, torch.ones_like(joint))
    torch.testing.assert_close(inside.sum(-1), torch.ones_like(inside.sum(-1)))


@pytest.mark.parametrize(("kind", "is_causal"), FORMS)
@pytest.mark.parametrize("implementation", ["eager", "torch"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_padding_and_packing_give_what_a_sequence_gives_alone(kind, is_causal, implementation, pool):
    mechanism = COMBINERS[kind]
    call = make_call(kind, 24, 4, is_causal, heads=(4, 2), pool=pool)
    segments = torch.tensor([0] * 3 + [1] * 9 + [2] * 11 + [0])
    mask = (segments[:, None] == segments) & (segments > 0)
    call.attention_mask = (mask.tril() if is_causal else mask)[None, None]
    call.is_causal = False
    reason = getattr(mechanism.implementation(f"combiner_{kind}_{implementation}").check(call), "reason", None)
    if reason is not None:
        assert implementation == "torch" and ("pool" in reason or "non-causal" in reason)
        return
    packed = run(call, implementation)
    assert bool((packed[:, :, segments == 0] == 0).all())
    for first, last in ((3, 12), (12, 23)):
        alone = make_call(kind, 24, 4, is_causal, heads=(4, 2), pool=pool)
        alone.query, alone.key, alone.value = (
            states[:, :, first:last] for states in (alone.query, alone.key, alone.value)
        )
        if kind == ROWMAJOR:
            alone.row_input = alone.row_input[:, first:last]
        torch.testing.assert_close(packed[:, :, first:last], run(alone, "eager"))


@pytest.mark.parametrize("is_causal", [True, False])
def test_long_segments_go_through_fused_attention(is_causal):
    call = make_call("fixed", 300, 100, is_causal)
    torch.testing.assert_close(run(call, "torch"), run(call, "eager"))


def refusal(call: CombinerCall) -> str:
    with pytest.raises(ValueError) as error:
        COMBINERS[call.kind](call, f"combiner_{call.kind}_eager")
    return str(error.value)


def test_masks_with_gaps_are_refused():
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 3] = False
    assert "gaps" in refusal(make_call("fixed", 8, 4, False, attention_mask=mask))


def test_what_has_no_meaning_for_spans_is_refused():
    assert "window" in refusal(make_call("fixed", 8, 4, sliding_window=3))
    bias = torch.randn(1, 1, 8, 8)
    assert "additive masks" in refusal(make_call("fixed", 8, 4, False, attention_mask=bias))
    for kind in ("logsparse", "mixture"):
        assert "causal attention only" in refusal(make_call(kind, 8, 4, False))
    assert "own_segment_summary" in refusal(make_call("vertical", 8, 4, False, own_segment_summary=True))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_call("fixed", 8, 0)
    with pytest.raises(ValueError, match="pool must be one of"):
        make_call("fixed", 8, 4, pool="median")


def test_the_own_summary_counts_own_tokens_twice():
    call = make_call("fixed", 12, 4, False, own_segment_summary=True)
    other = make_call("fixed", 12, 4, False)
    torch.testing.assert_close(run(call, "torch"), run(call, "eager"))
    weights, disjoint = (COMBINERS["fixed"](c, "combiner_fixed_eager")[1] for c in (call, other))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert bool((weights[..., :4, :4].sum((-1, -2)) > disjoint[..., :4, :4].sum((-1, -2))).all())
