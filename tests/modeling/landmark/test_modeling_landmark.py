"""The landmark family: the facts of its paper, its bases, memory, generation, saving."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from hf_attn.modeling.landmark.cache import RETRIEVALS
from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from hf_attn.modeling.landmark.insertion import Insertion, check_landmark_token
from hf_attn.modeling.landmark.modeling_landmark import (
    LANDMARK_TOKEN,
    LandmarkCache,
    LandmarkForCausalLM,
    add_landmark_token,
)
from hf_attn.modeling.landmark.reading import plot_reading, reading_counts


VOCAB, FREQ, BLOCK = 40, 4, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_with_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def make_base(name: str = "llama", **overrides):
    set_seed(0)
    model_class, config_class, special = BASES[name]
    model = model_class(config_class(**{**SIZES, **special, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def make_model(name: str = "llama", **overrides) -> LandmarkForCausalLM:
    overrides = {"mem_freq": FREQ, "train_context_length": 40, **overrides}
    model = LandmarkForCausalLM.from_base(make_base(name), **overrides)
    # The mean of random rows is almost nothing, and landmarks would all be alike.
    set_seed(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB].normal_()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def with_landmarks(ids: torch.Tensor) -> torch.Tensor:
    return Insertion.of(torch.ones_like(ids, dtype=torch.bool), FREQ).apply(ids, VOCAB)


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


# --- facts of the paper ----------------------------------------------------------------------------------------------


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
    """A single layer, one row, query by query: the k blocks of the largest scores at their stingy places, the rest gone."""
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
    """Rows of different lengths give what each gives alone, prompts and further tokens."""
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
    """If all that is remembered is read, it is attention to the last two blocks, which a mask says as well."""
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
    with pytest.raises(ValueError, match="processed in pieces of 10"):
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
    # A landmark would be the most probable token always.
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
    # The last step has 2 tokens, each of 4 heads reads 2 blocks.
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


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_inputs_say_what_is_wrong():
    model, ids = make_model(), random_ids(1, 11)
    with pytest.raises(ValueError, match=r"holds landmarks \(token 40\)"):
        model.generate(with_landmarks(ids), max_new_tokens=2)
    with pytest.raises(ValueError, match="must be a LandmarkCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static' is no memory"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="no effect with use_cache=False"):
        model.generate(ids, cache_top_k=2, use_cache=False, max_new_tokens=2)
    for name in ("top_k", "max_chunk_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, or None, got 0"):
            LandmarkCache(model.config, **{name: 0})
    with pytest.raises(ValueError, match=r"retrieval must be one of per_token_and_head, .*'nearest'"):
        LandmarkCache(model.config, retrieval="nearest")
    changing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"rotary embedding of the model \('dynamic'\) changes with the length"):
        LandmarkCache(LandmarkConfig(**SIZES, rope_parameters=changing), top_k=2)
    with pytest.raises(ValueError, match="changes with the length"):
        dynamic = LandmarkForCausalLM(LandmarkConfig(**SIZES, rope_parameters=changing))
        dynamic(ids, past_key_values=dynamic(ids).past_key_values)
    with pytest.raises(ValueError, match=r"max_blocks \(1\) must be at least top_k \(2\)"):
        LandmarkCache(model.config, top_k=2, max_blocks=1)
    with pytest.raises(ValueError, match="needs the configuration of a landmark model, got LlamaConfig"):
        LandmarkCache(LlamaConfig())
    with pytest.raises(ValueError, match=r"Retrieval \(top_k=2\) needs a landmark after every 4 regular tokens"):
        model(ids, past_key_values=LandmarkCache(model.config, top_k=2))
    with pytest.raises(ValueError, match="padding inside a row"):
        mask = torch.ones_like(ids)
        mask[0, 4] = 0
        model(ids, attention_mask=mask)
    memory = LandmarkCache(model.config)
    logits_of(model, ids, past_key_values=memory)
    with pytest.raises(ValueError, match="filled with insert_landmarks=False"):
        model(ids, past_key_values=memory, insert_landmarks=True)
    with pytest.raises(ValueError, match="holds 1 rows, the input has 2"):
        model(ids.repeat(2, 1), past_key_values=memory)
    with pytest.raises(ValueError, match="record_retrieved=True"):
        _ = memory.retrieved_blocks
    with pytest.raises(ValueError, match="computes landmark attention"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mem_freq": 7}, "made for mem_freq=7, and this model has mem_freq=4"),
        ({"num_hidden_layers": 3}, "made for num_hidden_layers=3, and this model has num_hidden_layers=2"),
        (
            {"num_key_value_heads": 4, "head_dim": 16},
            "made for num_key_value_heads=4, head_dim=16, and this model has num_key_value_heads=2, head_dim=8",
        ),
    ],
    ids=str,
)
def test_a_cache_of_another_model_is_refused(other, message):
    model, ids = make_model(), random_ids(1, 11)
    cache = LandmarkCache(LandmarkConfig(**{**SIZES, "mem_freq": FREQ, **other}), top_k=2)
    with pytest.raises(ValueError, match=message):
        model(ids, past_key_values=cache, insert_landmarks=True)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_a_cache_has_its_own_memory_settings():
    model, ids = make_model(), random_ids(1, 11)
    with pytest.raises(ValueError, match="no effect with use_cache=False or with past_key_values, which has its own"):
        model.generate(ids, past_key_values=LandmarkCache(model.config, top_k=2), cache_top_k=3, max_new_tokens=2)


def test_padding_inside_a_sequence_is_refused_with_a_memory_too():
    model, ids = make_model(), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 3:5] = 0
    for arguments in ({"insert_landmarks": True}, {"past_key_values": LandmarkCache(model.config)}):
        with pytest.raises(ValueError, match="padding inside a row"):
            model(ids, attention_mask=mask, **arguments)
    with pytest.raises(ValueError, match="padding inside a row"):
        model.generate(ids, attention_mask=mask, cache_top_k=2, max_new_tokens=2)


def test_a_landmark_that_was_cut_off_is_missed():
    model = make_model()
    model.resize_token_embeddings(VOCAB - 3)
    with pytest.raises(ValueError, match=r"landmark_token_id \(40\) is not in the vocabulary of 37 tokens"):
        model.generate(random_ids(1, 11).clamp(max=9), max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"landmark_token_id": 40}, r"landmark_token_id \(40\) must be a token of the vocabulary, which has 40"),
        ({"mem_freq": 0}, "mem_freq=0 is out of range: it must be at least 1"),
        ({"train_context_length": 0}, "train_context_length=0 is out of range: it must be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        LandmarkConfig(**SIZES, **fields)


def test_unsupported_bases_are_refused():
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"from a 'gpt2' model. Supported bases: llama, mistral, qwen2, qwen3"):
        LandmarkForCausalLM.from_base(base)
    with pytest.raises(ValueError, match="sliding windows"):
        LandmarkForCausalLM.from_base(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
    with pytest.raises(ValueError, match="adds the landmark token itself"):
        LandmarkForCausalLM.from_base(make_base(), landmark_token_id=3)


# --- tokenizer, saving -----------------------------------------------------------------------------------------------


def make_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")


def test_tokenizer():
    tokenizer = make_tokenizer()
    assert add_landmark_token(tokenizer) == add_landmark_token(tokenizer) == VOCAB
    assert LANDMARK_TOKEN in tokenizer.all_special_tokens
    assert tokenizer("w3 <landmark> w4")["input_ids"] == [3, VOCAB, 4]
    assert tokenizer.decode([3, VOCAB, 4], skip_special_tokens=True) == "w3 w4"


def test_a_tokenizer_without_the_landmark_of_the_model_is_refused():
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ValueError, match="has no <landmark>, which is token 40 of the model"):
        check_landmark_token(tokenizer, model.config)
    add_landmark_token(tokenizer)
    check_landmark_token(tokenizer, model.config)
    smaller = make_tokenizer(36)
    add_landmark_token(smaller)
    with pytest.raises(ValueError, match="<landmark> is token 36 of the tokenizer and 40 of the model"):
        check_landmark_token(smaller, model.config)


def test_a_tokenizer_that_is_smaller_than_the_vocabulary():
    """Padded vocabularies: the landmark takes the first unused row."""
    base, tokenizer = make_base(), make_tokenizer(36)
    model = LandmarkForCausalLM.from_base(base, tokenizer=tokenizer)
    assert (model.config.landmark_token_id, model.config.vocab_size) == (36, VOCAB)
    torch.testing.assert_close(model.lm_head.weight[36], base.lm_head.weight[:36].mean(0))
    assert torch.equal(model.lm_head.weight[37:], base.lm_head.weight[37:])


FRESH_PROCESS = """
import json, sys, torch, hf_attn
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder)
torch.save((type(model).__name__, model.state_dict(), model(ids).logits), f"{folder}/reloaded.pt")
"""


def test_round_trip_in_a_fresh_process(tmp_path):
    model, ids = make_model("qwen3"), with_landmarks(random_ids(2, 9))
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path), json.dumps(ids.tolist())], check=True)
    class_name, state, logits = torch.load(tmp_path / "reloaded.pt")
    assert class_name == "LandmarkForCausalLM"
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits, logits_of(model, ids))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (reloaded.config.mem_freq, reloaded.config.landmark_token_id) == (FREQ, VOCAB)
    assert reloaded.config._attn_implementation == "landmark"
