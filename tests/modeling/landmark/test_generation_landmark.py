"""The landmark family: ties among blocks, positions, ways to generate, export."""

import pytest
import torch

from hf_attn.modeling.landmark.cache import LandmarkCache
from hf_attn.modeling.landmark.retrieval import TIE_TOLERANCE, _best
from tests.modeling.landmark.test_modeling_landmark import CLOSE, logits_of, make_model, random_ids, with_landmarks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_blocks_that_tie_the_newer_ones_are_retrieved(dtype):
    numbers = torch.tensor([[[[7, 1, 4, -1, 3]]]])
    relative = max(TIE_TOLERANCE, torch.finfo(dtype).eps)
    within, beyond = 5.0 * (1 - 0.8 * relative), 5.0 * (1 - 3 * relative)
    for scores, expected in (
        ([5.0, 5.0, 5.0, float("-inf"), 5.0], {7, 4}),
        ([within, 5.0, within, float("-inf"), -9.0], {7, 4}),
        ([beyond, 5.0, 5.0, float("-inf"), -4.0], {1, 4}),
        ([-5.0, 3.0, -5.0, float("-inf"), -5.0], {1, 7}),
        ([1.0, 2.0, 3.0, float("-inf"), 4.0], {4, 3}),
    ):
        slots = _best(torch.tensor([[[scores]]], dtype=dtype), numbers, 2)
        assert set(numbers.flatten()[slots.flatten()].tolist()) == expected
    few = torch.tensor([[[[-1, 0, -1, -1, -1]]]])
    scores = torch.full((1, 1, 1, 5), float("-inf"), dtype=dtype).index_fill(-1, torch.tensor([1]), -2.0)
    assert 1 in _best(scores, few, 2)


def test_old_blocks_tie_in_the_first_layer_and_rounding_does_not_decide():
    model = make_model().eval()
    ids = random_ids(1, 60)
    cache = LandmarkCache(model.config, top_k=3, max_chunk_length=5, record_retrieved=True)
    logits_of(model, ids, past_key_values=cache, insert_landmarks=True)
    # At the last step there are 14 blocks. 11 of them have the same position, so their landmarks have the same key.
    chosen = cache.retrieved_blocks[0][-1].flatten(0, 2)
    for numbers in chosen.tolist():
        old = [number for number in numbers if number < 14 - 3]
        assert old == list(range(11 - len(old), 11))


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_that_are_not_counted_ones_are_refused(use_cache):
    model, ids = make_model(), random_ids(2, 9)
    arguments = {"insert_landmarks": True, "use_cache": use_cache}
    counted = torch.arange(9).expand(2, -1)
    output = model(ids, **arguments)
    for positions in (counted, counted + 5, counted[:1]):
        assert torch.equal(model(ids, position_ids=positions, **arguments).logits, output.logits)
    for positions in (counted * 2, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)):
        with pytest.raises(ValueError, match="position_ids do not count the tokens"):
            model(ids, position_ids=positions, **arguments)
    if use_cache:
        memory = output.past_key_values
        with pytest.raises(ValueError, match="from the end of the cache on"):
            model(ids[:, :1], position_ids=counted[:, :1], past_key_values=memory, insert_landmarks=True)
        model(ids[:, :1], position_ids=counted[:, :1] + 9, past_key_values=memory, insert_landmarks=True)


@pytest.mark.parametrize("options", [{}, {"cache_top_k": 2}, {"use_cache": False}], ids=["all", "top_2", "no_cache"])
def test_guidance_inserts_landmarks_without_the_prompt_too(options):
    model, ids = make_model(), random_ids(1, 14)
    negative = random_ids(1, 11, seed=2)
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    guided = model.generate(ids, guidance_scale=2.0, negative_prompt_ids=negative, **settings, **options)
    top_k = options.get("cache_top_k")

    def last_logits(prompt):
        memory = LandmarkCache(model.config, top_k=top_k)
        return logits_of(model, prompt, past_key_values=memory, insert_landmarks=True)[:, -1].log_softmax(-1)

    conditional, unconditional = last_logits(ids), last_logits(negative)
    expected = 2.0 * (conditional - unconditional) + unconditional
    expected[:, model.config.landmark_token_id] = float("-inf")
    torch.testing.assert_close(guided.scores[0], expected, **CLOSE)


def test_export_with_a_free_length():
    model, ids = make_model(), with_landmarks(random_ids(2, 17))
    length = torch.export.Dim("length", min=2, max=100)
    exported = torch.export.export(
        model, (ids,), {"use_cache": False}, dynamic_shapes={"input_ids": {1: length}, "use_cache": None}
    ).module()
    for other in (ids, with_landmarks(random_ids(2, 33)), random_ids(2, 3)):
        torch.testing.assert_close(exported(other, use_cache=False).logits, logits_of(model, other), **CLOSE)


def test_early_exit_and_chunked_prefill_generate_the_same():
    model, ids = make_model(), random_ids(1, 14)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    for options in ({"assistant_early_exit": 1}, {"prefill_chunk_size": 5}):
        assert torch.equal(model.generate(ids, **settings, **options), expected)
