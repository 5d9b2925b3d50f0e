"""The landmark family: properties from the paper, bases, memory, generation, saving."""

import pytest
import torch
from transformers import (
    set_seed,
)

from hf_attn.modeling.landmark.cache import RETRIEVALS
from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from hf_attn.modeling.landmark.modeling_landmark import (
    LandmarkCache,
    LandmarkForCausalLM,
)
from hf_attn.modeling.landmark.reading import plot_reading, reading_counts

from .tiny import BASES, BLOCK, CLOSE, FREQ, VOCAB, logits_of, make_base, make_model, random_ids, with_landmarks


# --- properties from the paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "parameters"), [("llama_7b", 6_738_432_000), ("gpt_pg19", 202_531_840)])
def test_published_variants_have_the_published_parameters(variant, parameters):
    with torch.device("meta"):
        model = LandmarkForCausalLM(LandmarkConfig.from_variant(variant))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("implementation", ["eager", "landmark", "landmark_torch"])
@pytest.mark.parametrize("name", BASES)
def test_without_landmarks_it_is_the_base(name, implementation):
    base, ids = make_base(name), random_ids(2, 9)
    model = LandmarkForCausalLM.from_base(base)
    model.set_attn_implementation(implementation)
    expected = logits_of(base, ids)
    torch.testing.assert_close(logits_of(model, ids)[..., :VOCAB], expected, **CLOSE)
    with pytest.raises(AssertionError):
        logits = logits_of(model, torch.where(torch.arange(9) == 4, VOCAB, ids))[..., :VOCAB]
        torch.testing.assert_close(logits[:, 5:], expected[:, 5:], **CLOSE)


def test_weights_sum_to_one_and_landmarks_have_none():
    model, ids = make_model(), with_landmarks(random_ids(2, 17))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, ids.shape[1]))
        assert (weights[..., ids[0] == VOCAB] == 0).all()
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "landmark"])
def test_shifting_all_positions_changes_nothing(implementation):
    model, ids = make_model(), with_landmarks(random_ids(2, 17))
    model.set_attn_implementation(implementation)
    positions = torch.arange(ids.shape[1])[None]
    shifted = logits_of(model, ids, position_ids=positions + 11, use_cache=False)
    torch.testing.assert_close(shifted, logits_of(model, ids, position_ids=positions, use_cache=False), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_the_landmark_gets_the_mean_rows(name):
    base = make_base(name)
    model = LandmarkForCausalLM.from_base(base)
    tables = 1 if name == "llama_tied" else 2
    assert model.num_parameters() - base.num_parameters() == tables * 32 == model.base_report.new_parameters
    assert model.config.landmark_token_id == VOCAB == model.config.vocab_size - 1
    for ours, theirs in (
        (model.get_input_embeddings(), base.get_input_embeddings()),
        (model.get_output_embeddings(), base.get_output_embeddings()),
    ):
        torch.testing.assert_close(ours.weight[VOCAB], theirs.weight.mean(0))
        assert torch.equal(ours.weight[:VOCAB], theirs.weight)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrieval", RETRIEVALS)
@pytest.mark.parametrize("chunk", [5, 10, 7, 1, 100])
@pytest.mark.parametrize("offload", [False, True])
def test_with_all_blocks_retrieved_it_is_one_full_forward(retrieval, chunk, offload):
    """Also for chunks that are no multiples of a block."""
    model, ids = make_model(), with_landmarks(random_ids(2, 27))
    cache = LandmarkCache(model.config, top_k=6, retrieval=retrieval, max_chunk_length=chunk, offload_to_cpu=offload)
    expected = logits_of(model, ids, use_cache=False)
    torch.testing.assert_close(logits_of(model, ids, past_key_values=cache), expected, **CLOSE)


def test_blocks_that_are_not_retrieved_do_not_exist():
    model, ids = make_model(), with_landmarks(random_ids(2, 27))
    expected = logits_of(model, ids, use_cache=False)
    cache = LandmarkCache(model.config, top_k=2, max_chunk_length=15)
    logits = logits_of(model, ids, past_key_values=cache)
    # The second chunk reads two of the three blocks of the first.
    torch.testing.assert_close(logits[:, :15], expected[:, :15], **CLOSE)
    assert not torch.allclose(logits[:, 15:], expected[:, 15:], **CLOSE)


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_retrieval_equals_the_paper_written_out(retrieval):
    """A single layer and one row, query by query: the k blocks with the largest scores at their stingy positions, and no others."""
    model = make_model(num_key_value_heads=2)
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    ids, top_k, past = with_landmarks(random_ids(1, 26)), 2, 23
    cache = LandmarkCache(model.config, top_k=top_k, retrieval=retrieval, max_chunk_length=past, record_retrieved=True)
    outputs = []
    attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    logits_of(model, ids, past_key_values=cache)

    with torch.no_grad():
        states = norm(model.model.embed_tokens(ids))[0]
        length, heads, width = len(states), 4, attention.head_dim
        query = attention.q_proj(states).view(length, heads, width)
        key, value = (
            projection(states).view(length, 2, width).repeat_interleave(2, dim=1)
            for projection in (attention.k_proj, attention.v_proj)
        )

        def rotated(vector: torch.Tensor, position: int) -> torch.Tensor:
            angle = position / 10000 ** (torch.arange(0, width, 2) / width)
            first, second = vector[: width // 2], vector[width // 2 :]
            return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

        def score(i: int, head: int, j: int, position: int) -> torch.Tensor:
            return rotated(query[i, head], i) @ rotated(key[j, head], position) / width**0.5

        blocks = past // BLOCK
        base = (blocks - top_k - 1) * BLOCK
        landmark_scores = torch.stack(
            [
                torch.stack(
                    [
                        torch.stack(
                            [
                                score(i, h, n * BLOCK + FREQ, base + max(0, n - blocks + top_k + 1) * BLOCK + FREQ)
                                for n in range(blocks)
                            ]
                        )
                        for h in range(heads)
                    ]
                )
                for i in range(past, length)
            ]
        )
        if retrieval != "per_token_and_head":
            shares = landmark_scores.softmax(-1)
            shared = {
                "max_over_tokens": lambda: shares.amax(0, keepdim=True),
                "max_over_heads": lambda: shares.amax(1, keepdim=True),
                "max_over_tokens_and_heads": lambda: shares.amax((0, 1), keepdim=True),
            }[retrieval]()
            landmark_scores = shared.expand_as(landmark_scores)
        expected = torch.zeros(length - past, heads, width)
        for i in range(past, length):
            for h in range(heads):
                chosen = sorted(landmark_scores[i - past, h].topk(top_k).indices.tolist())
                recorded = cache.retrieved_blocks[0][0].expand(1, heads, length - past, top_k)
                assert recorded[0, h, i - past].tolist() == chosen
                own_logits, own_values = [], []
                for rank, n in enumerate(chosen):
                    place = base + (rank + (n >= blocks - top_k)) * BLOCK
                    within = torch.stack([score(i, h, n * BLOCK + o, place + o) for o in range(FREQ)]).softmax(0)
                    own_logits.append(score(i, h, n * BLOCK + FREQ, place + FREQ))
                    own_values.append(within @ value[n * BLOCK : n * BLOCK + FREQ, h])
                own = i // BLOCK
                for n in range(blocks, own):
                    within = torch.stack([score(i, h, n * BLOCK + o, n * BLOCK + o) for o in range(FREQ)]).softmax(0)
                    own_logits.append(score(i, h, n * BLOCK + FREQ, n * BLOCK + FREQ))
                    own_values.append(within @ value[n * BLOCK : n * BLOCK + FREQ, h])
                for j in range(own * BLOCK, i + 1):
                    if j % BLOCK != FREQ:
                        own_logits.append(score(i, h, j, j))
                        own_values.append(value[j, h])
                expected[i - past, h] = torch.stack(own_logits).softmax(0) @ torch.stack(own_values)
        expected = attention.o_proj(expected.flatten(1))
    torch.testing.assert_close(outputs[-1][0], expected, **CLOSE)


@pytest.mark.parametrize("retrieval", RETRIEVALS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_do_not_touch_each_other(retrieval, side):
    """Rows of different lengths give the same results as alone, for prompts and further tokens."""
    model, ids, more = make_model(), random_ids(3, 33), random_ids(3, 6, seed=2)
    lengths = [33, 20, 9]

    def cache():
        return LandmarkCache(model.config, top_k=2, retrieval=retrieval, max_chunk_length=10)

    alone = []
    for row, length in enumerate(lengths):
        memory = cache()
        pieces = [ids[row : row + 1, :length], *more[row : row + 1].split(1, dim=1)]
        alone.append([logits_of(model, piece, past_key_values=memory, insert_landmarks=True)[0] for piece in pieces])

    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(33 - length, None) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    memory = cache()
    prompt = logits_of(model, padded, attention_mask=mask, past_key_values=memory, insert_landmarks=True)
    for row in range(3):
        torch.testing.assert_close(prompt[row][mask[row].bool()], alone[row][0], **CLOSE)
    for step in range(6):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        arguments = {"attention_mask": mask, "past_key_values": memory, "insert_landmarks": True}
        logits = logits_of(model, more[:, step : step + 1], **arguments)
        for row in range(3):
            torch.testing.assert_close(logits[row], alone[row][step + 1], **CLOSE)
    assert memory.get_seq_length() == 39


def test_old_blocks_are_forgotten():
    """If all stored blocks are read, the result equals masked attention to the last two blocks."""
    model, ids = make_model(), with_landmarks(random_ids(2, 41))
    memory = LandmarkCache(model.config, top_k=2, max_chunk_length=BLOCK, max_blocks=2, record_retrieved=True)
    logits = logits_of(model, ids, past_key_values=memory)
    assert memory.layers[0].keys.shape[2] == 3 * BLOCK
    assert [step[0, 0, 0].tolist() for step in memory.retrieved_blocks[0]][-1] == [8, 9]
    length = ids.shape[1]
    block = torch.arange(length) // BLOCK
    allowed = (block >= block[:, None] - 2) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    torch.testing.assert_close(logits, logits_of(model, ids, attention_mask=mask), **CLOSE)


def test_bfloat16_memory():
    model, ids = make_model().bfloat16(), random_ids(2, 60)
    memory = LandmarkCache(model.config, top_k=2)
    logits = logits_of(model, ids, past_key_values=memory, insert_landmarks=True)
    assert logits.dtype == memory.layers[0].keys.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_chunk_length_leaves_room_for_the_retrieved_blocks():
    """512 tokens of training, blocks of 51 and 5 retrieved blocks leave 204."""
    config = LandmarkConfig(mem_freq=50, train_context_length=512)
    assert LandmarkCache(config, top_k=5).max_chunk_length == 204
    assert LandmarkCache(config, top_k=50).max_chunk_length == 51
    assert LandmarkCache(config).max_chunk_length is None


def test_hidden_states_of_pieces_are_joined():
    model, ids = make_model(), with_landmarks(random_ids(1, 27))
    memory = LandmarkCache(model.config, top_k=6, max_chunk_length=10)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        states = model(ids, output_hidden_states=True, past_key_values=memory).hidden_states
    assert len(states) == 3
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    with pytest.raises(ValueError, match="processed in chunks of 10"):
        model(ids, output_attentions=True, past_key_values=LandmarkCache(model.config, top_k=6, max_chunk_length=10))


# --- hidden landmarks and generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at_landmarks", [True, False])
def test_hidden_landmarks(at_landmarks):
    model, ids = make_model(include_landmark_in_loss=at_landmarks), random_ids(2, 11)
    hidden = logits_of(model, ids, insert_landmarks=True)
    seen = logits_of(model, with_landmarks(ids))
    columns = [0, 1, 2, 3 + at_landmarks, 5, 6, 7, 8 + at_landmarks, 10, 11, 12]
    torch.testing.assert_close(hidden, seen[:, columns], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"cache_top_k": 20}, {"use_cache": False}], ids=["all", "top_20", "no_cache"])
def test_generate_inserts_landmarks(options):
    model, ids = make_model(), random_ids(2, 11)
    expected = ids
    for _ in range(12):
        logits = logits_of(model, expected, insert_landmarks=True)[:, -1, :VOCAB]
        expected = torch.cat([expected, logits.argmax(-1)[:, None]], dim=1)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("top_k", [None, 2])
def test_beams_and_samples_never_hold_a_landmark(options, top_k):
    model, ids = make_model(), random_ids(2, 30)
    # A landmark would always be the most probable token.
    with torch.no_grad():
        model.lm_head.weight[VOCAB] = 3 * model.lm_head.weight[:VOCAB].abs().max(0).values
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    set_seed(0)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, cache_top_k=top_k, **options)
    assert generated.shape[1] == 42
    assert (generated != VOCAB).all()


def test_beam_search_follows_its_beams_through_the_memory():
    model, ids = make_model(), random_ids(2, 11)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, cache_top_k=20, **arguments), expected)
    assert torch.equal(model.generate(ids, **arguments), expected)


def test_a_conversation_continues_from_its_memory():
    model, ids = make_model(), random_ids(1, 30)
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(ids, cache_top_k=2, max_chunk_length=5, max_new_tokens=9, record_retrieved=True, **options)
    first = model.generate(ids, cache_top_k=2, max_chunk_length=5, max_new_tokens=4, **options)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(rest.sequences, whole.sequences)
    for layer in whole.past_key_values.retrieved_blocks:
        assert len(layer) == 7 + 8
        assert layer[-1].shape[:2] == (1, 4) and layer[-1].shape[3] == 2


def test_what_was_read_is_counted_and_drawn(tmp_path):
    model, ids = make_model(), random_ids(2, 30)
    memory = LandmarkCache(model.config, top_k=2, max_chunk_length=5, record_retrieved=True)
    logits_of(model, ids, past_key_values=memory, insert_landmarks=True)
    counts = reading_counts(memory, row=1)
    assert counts.shape == (2, 7)
    expected = torch.zeros(7, dtype=torch.long)
    for numbers in memory.retrieved_blocks[1]:
        for number in numbers[1].flatten().tolist():
            expected[number] += number >= 0
    assert torch.equal(counts[1], expected)
    # The last step has 2 tokens, and each of 4 heads reads 2 blocks.
    assert reading_counts(memory, last_steps=1).sum(-1).tolist() == [16, 16]
    plot_reading(memory, tmp_path / "read.png")
    assert (tmp_path / "read.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="row must be between 0 and 1, got 2"):
        reading_counts(memory, row=2)
    with pytest.raises(ValueError, match="last_steps must be at least 1"):
        reading_counts(memory, last_steps=0)
    with pytest.raises(ValueError, match="Nothing was retrieved"):
        reading_counts(LandmarkCache(model.config, top_k=2, record_retrieved=True))
    with pytest.raises(ValueError, match="record_retrieved=True"):
        reading_counts(LandmarkCache(model.config, top_k=2))


@pytest.mark.parametrize("top_k", [None, 2])
def test_cropping_takes_hidden_landmarks_along(top_k):
    model, ids = make_model(), random_ids(1, 30)
    arguments = {"top_k": top_k, "max_chunk_length": 5}
    memory, fresh = LandmarkCache(model.config, **arguments), LandmarkCache(model.config, **arguments)
    with torch.no_grad():
        model(ids, past_key_values=memory, insert_landmarks=True)
        memory.crop(-9)
        model(ids[:, :21], past_key_values=fresh, insert_landmarks=True)
    assert memory.get_seq_length() == fresh.get_seq_length() == 21
    assert torch.equal(memory.lengths, fresh.lengths)
    step = random_ids(1, 1, seed=5)
    ours, theirs = (logits_of(model, step, past_key_values=m, insert_landmarks=True) for m in (memory, fresh))
    torch.testing.assert_close(ours, theirs, **CLOSE)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = make_model().train(), with_landmarks(random_ids(2, 17))
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_all_implementations_give_the_same_gradients():
    model, ids = make_model(), with_landmarks(random_ids(2, 17))
    gradients = []
    for implementation in ("eager", "landmark_torch"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_autocast_reaches_the_fast_implementation():
    """Queries, keys and values have one dtype, as the blockwise implementation requires."""
    model, ids = make_model().train(), with_landmarks(random_ids(2, 17))
    model.set_attn_implementation("landmark_torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(ids, labels=ids, use_cache=False).loss.item(), rel=0.02)
