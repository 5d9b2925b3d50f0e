"""The landmark family: errors for bad input, tokenizers, saving."""

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
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from hf_attn.modeling.landmark.insertion import check_landmark_token
from hf_attn.modeling.landmark.modeling_landmark import (
    LANDMARK_TOKEN,
    LandmarkCache,
    LandmarkForCausalLM,
    add_landmark_token,
)

from .tiny import FREQ, SIZES, VOCAB, logits_of, make_base, make_model, random_ids, with_landmarks


def test_bad_inputs_say_what_is_wrong():
    model, ids = make_model(), random_ids(1, 11)
    with pytest.raises(ValueError, match=r"already contains landmarks \(token 40\)"):
        model.generate(with_landmarks(ids), max_new_tokens=2)
    with pytest.raises(ValueError, match="must be a LandmarkCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported with landmarks"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="no effect with use_cache=False"):
        model.generate(ids, cache_top_k=2, use_cache=False, max_new_tokens=2)
    for name in ("top_k", "max_chunk_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, or None, got 0"):
            LandmarkCache(model.config, **{name: 0})
    with pytest.raises(ValueError, match=r"retrieval must be one of per_token_and_head, .*'nearest'"):
        LandmarkCache(model.config, retrieval="nearest")
    changing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"rotary embedding of the model \('dynamic'\) changes with the input length"):
        LandmarkCache(LandmarkConfig(**SIZES, rope_parameters=changing), top_k=2)
    with pytest.raises(ValueError, match="changes with the input length"):
        dynamic = LandmarkForCausalLM(LandmarkConfig(**SIZES, rope_parameters=changing))
        dynamic(ids, past_key_values=dynamic(ids).past_key_values)
    with pytest.raises(ValueError, match=r"max_blocks \(1\) must be at least top_k \(2\)"):
        LandmarkCache(model.config, top_k=2, max_blocks=1)
    with pytest.raises(ValueError, match="needs the configuration of a landmark model, got LlamaConfig"):
        LandmarkCache(LlamaConfig())
    with pytest.raises(ValueError, match=r"Retrieval \(top_k=2\) needs a landmark after every 4 regular tokens"):
        model(ids, past_key_values=LandmarkCache(model.config, top_k=2))
    with pytest.raises(ValueError, match="padding within a row"):
        mask = torch.ones_like(ids)
        mask[0, 4] = 0
        model(ids, attention_mask=mask)
    memory = LandmarkCache(model.config)
    logits_of(model, ids, past_key_values=memory)
    with pytest.raises(ValueError, match="filled with insert_landmarks=False"):
        model(ids, past_key_values=memory, insert_landmarks=True)
    with pytest.raises(ValueError, match="has 1 rows, but the input has 2"):
        model(ids.repeat(2, 1), past_key_values=memory)
    with pytest.raises(ValueError, match="record_retrieved=True"):
        _ = memory.retrieved_blocks
    with pytest.raises(ValueError, match="computes landmark attention"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mem_freq": 7}, "made for mem_freq=7, but this model has mem_freq=4"),
        ({"num_hidden_layers": 3}, "made for num_hidden_layers=3, but this model has num_hidden_layers=2"),
        (
            {"num_key_value_heads": 4, "head_dim": 16},
            "made for num_key_value_heads=4, head_dim=16, but this model has num_key_value_heads=2, head_dim=8",
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
    with pytest.raises(ValueError, match="no effect with use_cache=False, or with past_key_values, which has its own"):
        model.generate(ids, past_key_values=LandmarkCache(model.config, top_k=2), cache_top_k=3, max_new_tokens=2)


def test_padding_inside_a_sequence_is_refused_with_a_memory_too():
    model, ids = make_model(), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 3:5] = 0
    for arguments in ({"insert_landmarks": True}, {"past_key_values": LandmarkCache(model.config)}):
        with pytest.raises(ValueError, match="padding within a row"):
            model(ids, attention_mask=mask, **arguments)
    with pytest.raises(ValueError, match="padding within a row"):
        model.generate(ids, attention_mask=mask, cache_top_k=2, max_new_tokens=2)


def test_a_landmark_that_was_cut_off_is_missed():
    model = make_model()
    model.resize_token_embeddings(VOCAB - 3)
    with pytest.raises(ValueError, match=r"landmark_token_id \(40\) is not in the vocabulary of 37 tokens"):
        model.generate(random_ids(1, 11).clamp(max=9), max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"landmark_token_id": 40}, r"landmark_token_id \(40\) must be below the vocabulary size, 40"),
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
