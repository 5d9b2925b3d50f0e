"""Perplexity by context length, against the loss of the model itself."""

import math

import pytest
import torch

from hf_attn.analysis.context_perplexity import perplexity_by_context, perplexity_of
from hf_attn.modeling.landmark.modeling_landmark import LandmarkCache, LandmarkForCausalLM
from tests.batteries.text import llama


@pytest.mark.parametrize("piece", [3, 8, 512])
def test_it_is_the_loss_of_the_segments(piece):
    model = llama(initializer_range=0.3).eval()
    tokens = torch.randint(0, 257, (59,), generator=torch.Generator().manual_seed(0))
    measured = perplexity_by_context(model, tokens, [8, 16], piece=piece, progress=False)
    for length, perplexity in measured.items():
        segments = tokens[:48].view(-1, length)
        with torch.no_grad():
            assert perplexity == pytest.approx(math.exp(model(segments, labels=segments).loss), rel=1e-4)


def test_a_model_with_landmarks_that_retrieves_everything():
    model = LandmarkForCausalLM.from_base(llama(initializer_range=0.3), mem_freq=3, include_landmark_in_loss=False)
    tokens = torch.randint(0, 257, (32,), generator=torch.Generator().manual_seed(0))
    measured = perplexity_by_context(
        model, tokens, [32], lambda: LandmarkCache(model.config, top_k=20), 7, progress=False, insert_landmarks=True
    )
    with torch.no_grad():
        logits = model(tokens[None], insert_landmarks=True).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
    assert measured[32] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_bad_lengths():
    tokens = torch.arange(20)
    with pytest.raises(ValueError, match=r"at least 2 tokens, got lengths \[1, 4\]"):
        perplexity_by_context(llama(), tokens, [1, 4])
    with pytest.raises(ValueError, match="has 20 tokens, fewer than one segment of 32"):
        perplexity_by_context(llama(), tokens, [4, 32])


def test_a_perplexity_that_no_number_holds_is_infinite():
    assert perplexity_of(0.5) == math.exp(0.5)
    assert perplexity_of(800.0) == math.inf
    assert math.isnan(perplexity_of(math.nan))
