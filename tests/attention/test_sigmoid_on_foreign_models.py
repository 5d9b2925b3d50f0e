"""`attn_implementation="sigmoid"` on models of transformers."""

import math
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    StaticCache,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging

from hf_attn.attention import uses_attention
from hf_attn.attention.sigmoid import SIGMOID

from . import models
from .accuracy import assert_as_exact
from .models import DECODERS, ENCODERS, inputs_of, main_output, make


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
all_names = pytest.mark.parametrize("sigmoid_name", SIGMOID.names, indirect=True)
all_decoders = pytest.mark.parametrize("kind", DECODERS)


def reference(module, query, key, value, attention_mask, scaling, **kwargs):
    """Sigmoid attention for a model of transformers with 64 positions or 12 patches, with additive masks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * scaling - math.log(12 if hasattr(module.config, "patch_size") else 64)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.sigmoid()
    return (weights @ value).transpose(1, 2).contiguous(), weights


@pytest.fixture(autouse=True, scope="module")
def register_reference():
    AttentionInterface.register("reference", reference)
    AttentionMaskInterface.register("reference", eager_mask)


def padded(side: str) -> dict[str, torch.Tensor]:
    """Inputs of [`inputs_of`], with three padding tokens in the second row."""
    input_ids = inputs_of("llama")["input_ids"]
    mask = torch.ones_like(input_ids)
    places = slice(0, 3) if side == "left" else slice(-3, None)
    input_ids[1, places] = 0
    mask[1, places] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@contextmanager
def captured_warnings(caplog):
    """Warnings of transformers' and our loggers, as if none had been given before."""
    logging.warning_once.cache_clear()
    root = logging.get_logger("transformers")
    root.propagate = True
    try:
        with caplog.at_level("WARNING"):
            yield caplog
    finally:
        root.propagate = False


# --- what is computed -------------------------------------------------------------------------------------------------


def run(kind: str, name: str, dtype: torch.dtype, weights_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output of a model and gradients of its parameters, all with the weights rounded to `weights_dtype`."""
    model = make(kind, name, weights_dtype).to(dtype)
    inputs = {k: v.to(weights_dtype).to(dtype) if v.is_floating_point() else v for k, v in inputs_of(kind).items()}
    output = main_output(model(**inputs))
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * projection.to(dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), **gradients}


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_specification_computes_the_equation(kind):
    computed, expected = (run(kind, name, torch.float64, torch.float64) for name in ("sigmoid_eager", "reference"))
    assert len(expected) > 10
    # the rotary embedding and the norms of some of these models are always float32
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-5)


@all_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_implementations_are_as_exact_as_the_specification(kind, dtype, sigmoid_name):
    exact = run(kind, "sigmoid_eager", torch.float64, dtype)
    specification, computed = (run(kind, name, dtype, dtype) for name in ("sigmoid_eager", sigmoid_name))
    for name, tensor in computed.items():
        assert_as_exact(tensor, specification[name], exact[name], name)


@all_names
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_padding_changes_nothing(kind, side, sigmoid_name):
    model = make(kind, sigmoid_name)
    inputs = padded(side)
    kept = inputs["attention_mask"][1].bool()
    with torch.no_grad():
        with_padding = main_output(model(**inputs))[1, kept]
        without = main_output(model(inputs["input_ids"][1:, kept]))[0]
    torch.testing.assert_close(with_padding, without, **CLOSE)


@all_names
@all_decoders
def test_later_tokens_do_not_change_earlier_outputs(kind, sigmoid_name):
    model = make(kind, sigmoid_name)
    input_ids = inputs_of(kind)["input_ids"]
    changed = input_ids.clone()
    changed[:, 5:] = changed[:, 5:].flip(0)
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-3)


@all_names
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3], [2, 7]], ids=str)
@all_decoders
def test_decoding_with_a_cache_equals_the_full_forward(kind, steps, sigmoid_name):
    model = make(kind, sigmoid_name)
    input_ids = inputs_of(kind)["input_ids"]
    cache, pieces = None, []
    with torch.no_grad():
        full = model(input_ids).logits
        for part in input_ids.split(steps, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@all_names
@all_decoders
def test_static_cache_equals_the_full_forward(kind, sigmoid_name):
    """The slots of the cache that are not filled yet must not count, with and without a mask from the user."""
    model = make(kind, sigmoid_name)
    input_ids = inputs_of(kind)["input_ids"]
    with torch.no_grad():
        full = model(input_ids).logits
        for with_mask in (False, True):
            cache, pieces, seen = StaticCache(config=model.config, max_cache_len=16), [], 0
            for part in input_ids.split([5, 1, 1, 2], dim=1):
                seen += part.shape[1]
                mask = torch.ones(2, seen, dtype=torch.long) if with_mask else None
                pieces.append(model(part, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
            torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)


@all_names
@all_decoders
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generate(kind, cache_implementation, sigmoid_name):
    """Greedy generation of a left-padded batch gives, for each row, what the row alone gives without a cache."""
    model = make(kind, sigmoid_name)
    inputs = padded("left")
    inputs.pop("position_ids")
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    batch = model.generate(**inputs, **settings, cache_implementation=cache_implementation)
    for row in range(2):
        prompt = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        alone = model.generate(prompt, **settings, use_cache=False)
        torch.testing.assert_close(torch.stack(batch.logits)[:, row], torch.stack(alone.logits)[:, 0], **CLOSE)


@all_names
@all_decoders
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_4d_masks_of_the_user(kind, form, sigmoid_name):
    """Two sequences in one row, separated only by the mask, give the same result as in separate rows."""
    model = make(kind, sigmoid_name)
    input_ids = inputs_of(kind)["input_ids"]
    first, second = input_ids[:1, :4], input_ids[1:, :5]
    segments = torch.tensor([0] * 4 + [1] * 5)
    mask = ((segments[:, None] == segments) & torch.ones(9, 9, dtype=torch.bool).tril())[None, None]
    if kind == "mistral":
        mask &= torch.ones(9, 9, dtype=torch.bool).triu(-(model.config.sliding_window - 1))
    if form == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        packed = model(
            torch.cat((first, second), 1),
            attention_mask=mask,
            position_ids=torch.tensor([[*range(4), *range(5)]]),
        ).logits
        alone = torch.cat((model(first).logits, model(second).logits), 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@all_names
@pytest.mark.parametrize("kind", ["llama", "mistral", "vit"])
def test_compiles_without_graph_breaks(kind, sigmoid_name):
    model = make(kind, sigmoid_name)
    inputs = inputs_of(kind)
    expected = main_output(model(**inputs))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = main_output(compiled(**inputs))
    torch.testing.assert_close(output, expected, **CLOSE)
    output.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


# --- the bias -----------------------------------------------------------------------------------------------------


def test_bias_is_minus_log_of_the_positions_and_can_be_set():
    """The default is that of the reference; `config.sigmoid_bias` overrides it, and is saved."""
    model = make("llama", "sigmoid")
    inputs = inputs_of("llama")
    with torch.no_grad():
        default = model(**inputs).logits
        model.config.sigmoid_bias = -math.log(64)
        torch.testing.assert_close(model(**inputs).logits, default, rtol=0, atol=0)
        model.config.sigmoid_bias = -2.0
        assert not torch.allclose(model(**inputs).logits, default, atol=1e-3)


def test_bias_that_is_set_survives_saving(tmp_path):
    model = make("llama", "sigmoid")
    model.config.sigmoid_bias = -2.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sigmoid")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs_of("llama")).logits, model(**inputs_of("llama")).logits)


def test_a_model_that_gives_no_length_needs_a_bias():
    config = Wav2Vec2Config(
        vocab_size=models.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        conv_dim=(16,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_conv_pos_embeddings=4,
    )
    model = Wav2Vec2Model._from_config(config, attn_implementation="sigmoid").eval()
    sound = torch.randn(1, 100)
    with pytest.raises(ValueError, match=r"Wav2Vec2Config has neither .* Set `model\.config\.sigmoid_bias`"):
        model(sound)
    model.config.sigmoid_bias = -3.0
    assert torch.isfinite(model(sound).last_hidden_state).all()


# --- warnings and errors ------------------------------------------------------------------------------------------


def test_saving_loses_the_choice_and_the_user_is_warned(tmp_path, caplog):
    model = make("llama", "sigmoid")
    with captured_warnings(caplog):
        model(**inputs_of("llama"))
        model(**inputs_of("llama"))
    warnings = [
        record.getMessage()
        for record in caplog.records
        if "softmax attention when it is loaded" in record.getMessage()
    ]
    assert len(warnings) == 1
    assert "LlamaConfig" in warnings[0] and "SigmoidAttentionForCausalLM" in warnings[0]

    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_unknown_name():
    with pytest.raises(ValueError, match="sigmoid_gpu"):
        make("llama", "sigmoid_gpu")


def test_pinned_implementation_says_why_it_cannot_serve():
    model = make("llama", "sigmoid_torch")
    with pytest.raises(
        ValueError, match=r"'sigmoid_torch' does not support this call: .*weights.*attn_implementation='sigmoid'"
    ):
        model(**inputs_of("llama"), output_attentions=True)


def test_automatic_name_returns_weights_on_request():
    inputs = inputs_of("llama")
    with torch.no_grad():
        attentions = make("llama", "sigmoid")(**inputs, output_attentions=True).attentions
        expected = make("llama", "reference")(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2
    for computed, weights in zip(attentions, expected, strict=True):
        torch.testing.assert_close(computed, weights, **CLOSE)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_uses_attention_passes(kind):
    uses_attention(make(kind, "sigmoid"), "sigmoid")


def test_uses_attention_raises_for_a_model_that_ignores_the_name():
    config = DebertaV2Config(
        vocab_size=models.VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = DebertaV2Model._from_config(config, attn_implementation="sigmoid")
    with pytest.raises(ValueError, match=r"DebertaV2Model ignores attn_implementation"):
        uses_attention(model, "sigmoid")


def test_uses_attention_raises_for_another_name():
    with pytest.raises(ValueError, match="configured with attn_implementation='sdpa', not 'sigmoid'"):
        uses_attention(make("llama", "sdpa"), "sigmoid")
