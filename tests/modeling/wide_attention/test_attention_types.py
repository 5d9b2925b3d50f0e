"""The attention types: against loops written from their definitions, padding, patterns, saving."""

import math
from functools import partial

import pytest
import torch

from hf_attn.modeling.wide_attention import functions, patterns
from hf_attn.modeling.wide_attention.configuration_wide_attention import ATTENTION_TYPES, WideTransformerConfig
from hf_attn.modeling.wide_attention.modeling_wide_attention import WideTransformerForSequenceClassification
from tests.batteries.imaging import randomize


#: sizes at which a short text tests the pattern of each type
ARGUMENTS = {
    "linformer": {"rank": 4},
    "local": {"block_size": 4},
    "sinkhorn": {"block_size": 4},
    "sparse": {"block_size": 8, "summary_size": 2},
    "longformer": {"window_size": 4, "num_global_tokens": 2},
    "synthesizer": {"rank": 4},
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
    "performer": {"num_features": 16},
}
#: types with weights for single keys
WEIGHTED = ("softmax", "local", "sparse", "longformer", "synthesizer", "bigbird")
BOTH = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
EVERY_TYPE = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)


def make_model(attention_type: str, implementation: str = "eager", **overrides):
    arguments = {"attention_kwargs": ARGUMENTS.get(attention_type, {}), **overrides}
    config = WideTransformerConfig.from_variant("tiny", attention_type=attention_type, **arguments)
    model = randomize(WideTransformerForSequenceClassification(config))
    model.set_attn_implementation(implementation)
    return model


def some_ids(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(0))


def some_heads(length: int = 11, head_dim: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(3))


def full_mask(length: int = 11) -> torch.Tensor:
    return torch.ones(2, 1, length, 1, dtype=torch.bool)


def softmax_reference(query, key, value, allowed):
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


# --- all of them --------------------------------------------------------------------------------------------------------


def test_there_are_ten():
    assert len(ATTENTION_TYPES) == 10


@EVERY_TYPE
@BOTH
def test_padding_on_the_right_changes_nothing_and_stays_finite(attention_type, implementation):
    model, ids = make_model(attention_type, implementation), some_ids()
    expected = model(ids).logits
    for count in (1, 5, 40):
        output = model(torch.cat([ids, torch.zeros(2, count, dtype=torch.long)], dim=1), output_hidden_states=True)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
        assert all(states.isfinite().all() for states in output.hidden_states)


@EVERY_TYPE
def test_implementations_agree_and_train(attention_type):
    ids = some_ids()
    ids[1, 12:] = 0
    models = [make_model(attention_type, name) for name in ("eager", "sdpa")]
    for model in models:
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert one.grad is not None and one.grad.isfinite().all(), name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@EVERY_TYPE
def test_saved_and_loaded(attention_type, tmp_path):
    model = make_model(attention_type)
    model.save_pretrained(tmp_path)
    again = WideTransformerForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.attention_kwargs == model.config.attention_kwargs
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)


@EVERY_TYPE
def test_bfloat16(attention_type):
    model = make_model(attention_type, "sdpa")
    expected = model(some_ids()).logits
    found = model.to(torch.bfloat16)(some_ids()).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@EVERY_TYPE
def test_weights_of_single_keys_are_recorded_where_there_are_any(attention_type):
    attentions = make_model(attention_type)(some_ids(), output_attentions=True).attentions
    if attention_type not in WEIGHTED:
        assert all(weights is None for weights in attentions)
        return
    assert [weights.shape for weights in attentions] == [(2, 4, 22, 22)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 22))


# --- patterns -----------------------------------------------------------------------------------------------------------


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize("attention_type", ["longformer", "sinkhorn", "bigbird"])
def test_onnx_computes_the_same_at_other_sizes(attention_type, tmp_path):
    """Those of which blocks, random blocks or global tokens depend on the length."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = Logits(make_model(attention_type, "sdpa")), tmp_path / "model.onnx"
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"input_ids": free, "attention_mask": free}
    example = (some_ids(), torch.ones(2, 21, dtype=torch.long))
    torch.onnx.export(model, example, path, dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in ((2, 21), (1, 7), (3, 33)):
        ids, mask = some_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, length - length // 3 :] = 0
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask)
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5, msg=f"{batch}, {length}")


def pattern(function, length: int) -> torch.Tensor:
    index = torch.arange(length)
    return function(index[:, None], index[None])


def test_blocks_of_local_attention_are_contiguous():
    allowed = pattern(partial(patterns.local, block_size=4), 10)
    for query in range(10):
        assert allowed[query].nonzero().flatten().tolist() == [key for key in range(10) if key // 4 == query // 4]


@pytest.mark.parametrize("window", [1, 4, 5, 100])
def test_window_of_longformer(window):
    allowed = pattern(partial(patterns.longformer, window_size=window, num_global_tokens=0), 12)
    for query in range(12):
        for key in range(12):
            assert allowed[query, key] == (key - query <= window // 2 and query - key < window - window // 2)


def test_fixed_pattern_of_sparse_attention():
    allowed = pattern(partial(patterns.sparse, block_size=4, summary_size=1), 12)
    assert allowed[0].all() and allowed[:, 0].all()
    assert allowed[6].nonzero().flatten().tolist() == [0, 3, 4, 5, 6]
    assert allowed[11].nonzero().flatten().tolist() == [0, 3, 7, 8, 9, 10, 11]


def test_bigbird_sees_neighbours_ends_and_random_blocks():
    config = WideTransformerConfig.from_variant(
        "tiny", attention_type="bigbird", attention_kwargs={"block_size": 2, "num_random_blocks": 2}
    )
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 31:] = False
    function = patterns.mask_function(config, mask, patterns.draw_random_blocks(config))
    index = torch.arange(40)
    allowed = torch.stack([function(torch.tensor(b), None, index[:, None], index[None]) for b in (0, 1)])
    for row, last in enumerate((19, 15)):
        for block in (5, 10):
            seen = {key // 2 for key in allowed[row, 2 * block].nonzero().flatten().tolist()}
            assert {0, block - 1, block, block + 1, last} <= seen and len(seen) <= 7
        assert allowed[row, 2 * last].all() and allowed[row, :, 2 * last].all()


@pytest.mark.parametrize(
    ("attention_type", "arguments"), [("local", {"block_size": 4}), ("longformer", {"window_size": 4})]
)
@BOTH
def test_patterns_reach_the_weights_with_padding(attention_type, arguments, implementation):
    model = make_model(attention_type, implementation, attention_kwargs=arguments)
    ids = some_ids(2, 14)
    ids[1, 6:] = 0
    attention = model.model.layers[0].self_attn
    seen = {}
    attention.o_proj.register_forward_hook(lambda module, inputs, output: seen.update(merged=inputs[0]))
    attention.register_forward_hook(lambda module, inputs, output: seen.update(states=inputs[0]))
    model(ids)
    query, key, value = (
        attention.heads(getattr(attention, f"{part}_proj"), seen["states"]).double() for part in "qkv"
    )
    mask = torch.cat([ids[:, :1] != 0, ids != 0], dim=1)
    functions_of = {"local": patterns.local, "longformer": partial(patterns.longformer, num_global_tokens=0)}
    allowed = pattern(partial(functions_of[attention_type], **arguments), 15)[None, None] & mask[:, None, None]
    expected = softmax_reference(query, key, value, allowed).transpose(1, 2).flatten(2).float()
    torch.testing.assert_close(seen["merged"][mask], expected[mask], atol=1e-5, rtol=1e-5)


# --- functions ----------------------------------------------------------------------------------------------------------


def test_linear_attention_by_loops():
    query, key, value = some_heads()
    mask = full_mask()
    mask[1, :, 7:] = False
    output = functions.linear_attention(query, key, value, mask)

    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    for batch, head, position in [(0, 0, 0), (1, 2, 3), (1, 1, 10)]:
        keys = [j for j in range(11) if mask[batch, 0, j]]
        weights = torch.stack([phi(query[batch, head, position]) @ phi(key[batch, head, j]) for j in keys])
        expected = (weights @ value[batch, head, keys]) / (weights.sum() + 1e-6)
        torch.testing.assert_close(output[batch, head, position], expected)


def test_linformer_with_the_identity_is_softmax_attention():
    query, key, value = some_heads()
    allowed = torch.ones(11, 11, dtype=torch.bool)
    key, mixed = (
        functions.linformer_projection(states, torch.eye(11).double(), full_mask()) for states in (key, value)
    )
    torch.testing.assert_close(
        softmax_reference(query, key, mixed, allowed), softmax_reference(query, key, value, allowed)
    )


def test_performer_comes_near_softmax_attention_with_many_features():
    query, key, value = some_heads()
    mask = full_mask()
    mask[0, :, 8:] = False
    query, key = query / 2, key / 2
    directions = torch.randn(60_000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = functions.performer_attention(query, key, value, mask, directions, "softmax")
    expected = softmax_reference(query, key, value, mask.transpose(-2, -1))
    assert ((found - expected) * mask).abs().max() < 0.1 * expected.abs().max()


def test_sinkhorn_mixes_blocks_by_the_sums_of_their_keys():
    _, key, value = some_heads(12)
    mask = full_mask(12)
    mask[1, :, 5:] = False
    scores = torch.nn.Linear(8, 6).double()
    key, value, mask = (states.unflatten(2, (3, 4)) for states in (key, value, mask))
    permutation = functions.sinkhorn_permutation(key, mask, scores)
    logits = scores(key[0, 1, 2].sum(0))[:3]
    torch.testing.assert_close(permutation[0, 1, 2], logits.softmax(-1))
    # The third block is padding.
    assert not permutation[1, :, :, 2].any()
    torch.testing.assert_close(permutation.sum(-1), torch.ones(2, 3, 3).double())
    _, values, masks = functions.sinkhorn_blocks(key, value, mask, permutation)
    expected = sum(permutation[0, 1, 2, block] * value[0, 1, block, 3] for block in range(3))
    torch.testing.assert_close(values[0, 1, 2, 4 + 3], expected)
    assert masks[1, 0, 1, :, 0].tolist() == [True, False, False, False, True, True, True, True]


def test_synthesizer_does_not_look_at_the_tokens():
    model = make_model("synthesizer")
    one, other = (model(ids, output_attentions=True).attentions[1] for ids in some_ids()[:, None])
    assert torch.equal(one, other)
    attention = model.model.layers[1].self_attn
    logits = attention.left_factor[:, :22] @ attention.right_factor[:, :22].transpose(-2, -1)
    torch.testing.assert_close(one[0], logits.softmax(-1))


def test_global_tokens_have_projections_of_their_own():
    model = make_model("longformer")
    attention = model.model.layers[0].self_attn
    weights = model(some_ids(), output_attentions=True).attentions[0]
    assert (weights[:, :, :2] > 0).all() and (weights[:, :, :, :2] > 0).all()
    assert not weights[:, :, 10, 14:].any()
    with torch.no_grad():
        attention.q_proj_global.weight.zero_()
    weights = model(some_ids(), output_attentions=True).attentions[0]
    torch.testing.assert_close(weights[:, :, :2], torch.full((2, 4, 2, 22), 1 / 22))


def test_tables_have_a_row_for_the_class_token():
    for attention_type in ("linformer", "synthesizer", "sinkhorn"):
        assert make_model(attention_type)(some_ids(1, 64)).logits.isfinite().all()


def test_more_blocks_than_sinkhorn_has_are_refused():
    model = make_model("sinkhorn", attention_kwargs={"block_size": 4, "max_blocks": 3})
    with pytest.raises(ValueError, match=r"22 tokens are 6 blocks of 4, but attention_kwargs\['max_blocks'\] is 3"):
        model(some_ids())


def test_defaults_are_those_of_the_benchmark():
    config = WideTransformerConfig(attention_type="sinkhorn")
    assert config.attention_kwargs == {"block_size": 50, "max_blocks": math.ceil(1001 / 50)}
    assert WideTransformerConfig(attention_type="longformer").attention_kwargs["window_size"] == 512
