"""A toy family on the decoder body, which mixes attention, values only, a running mean, and layers without a cache."""

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
    set_seed,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from hf_attn.architectures.decoder import (
    CACHE,
    DecoderAttention,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    EncoderConfig,
    FromLlamaMixin,
    Mixer,
    StateLayer,
    takes_cache,
)
from hf_attn.architectures.encoder import EncoderForMaskedLM, EncoderModel
from tests.batteries.generation import spread_weights
from tests.batteries.text import llama


@strict
class ToyConfig(DecoderConfig):
    model_type = "hf_attn_toy"

    mixer_types: list[str] | None = None


class RunningMean(Mixer):
    """Mean of the tokens so far."""

    cache_kind, mask_kind = StateLayer, "padding"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    @takes_cache
    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        valid = torch.ones_like(hidden_states[..., :1]) if attention_mask is None else attention_mask[..., None]
        total = (self.v_proj(hidden_states) * valid).cumsum(1)
        count = valid.to(total.dtype).cumsum(1)
        if cache is not None:
            states = cache.layers[self.layer_idx].states
            if states:
                total, count = total + states["total"], count + states["count"]
            states.update(total=total[:, -1:], count=count[:, -1:])
        return total / count.clamp(min=1), None


class ValuesOnly(DecoderAttention):
    """The mean of the values that a token sees."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx, has_queries_and_keys=False)

    @takes_cache
    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        value = self.cached_values(self.values(hidden_states), cache)
        length, keys = hidden_states.shape[1], value.shape[2]
        attention_mask = attention_mask[..., :keys]
        weights = attention_mask.to(value.dtype).clamp(min=-1e4).softmax(-1)
        assert weights.shape[-2:] == (length, keys)
        return self.output((weights @ value.repeat_interleave(self.num_key_value_groups, 1)).transpose(1, 2)), weights


class NoMixing(Mixer):
    cache_kind, mask_kind = StateLayer, "padding"

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


MIXERS = {"attention": DecoderAttention, "mean": RunningMean, "values": ValuesOnly, "none": NoMixing}


class ToyLayer(DecoderLayer):
    def make_mixer(self, config, layer_idx):
        kinds = config.mixer_types or ["attention"] * config.num_hidden_layers
        return MIXERS[kinds[layer_idx]](config, layer_idx)


class ToyPreTrainedModel(DecoderPreTrainedModel):
    config: ToyConfig
    layer_class = ToyLayer


class ToyModel(ToyPreTrainedModel, DecoderModel): ...


class ToyForCausalLM(FromLlamaMixin, ToyPreTrainedModel, DecoderForCausalLM):
    model_class = ToyModel


class ToyForSequenceClassification(GenericForSequenceClassification, ToyPreTrainedModel): ...


@strict
class ToyEncoderConfig(EncoderConfig):
    model_type = "hf_attn_toy_encoder"


class ToyEncoderPreTrainedModel(DecoderPreTrainedModel):
    config: ToyEncoderConfig


class ToyEncoderModel(ToyEncoderPreTrainedModel, EncoderModel): ...


class ToyForMaskedLM(ToyEncoderPreTrainedModel, EncoderForMaskedLM):
    model_class = ToyEncoderModel


class ToyForTokenClassification(GenericForTokenClassification, ToyEncoderPreTrainedModel): ...


for config_class, model_class in ((ToyConfig, ToyModel), (ToyEncoderConfig, ToyEncoderModel)):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def make(*kinds: str, **fields) -> ToyForCausalLM:
    set_seed(0)
    config = ToyConfig(mixer_types=list(kinds), num_hidden_layers=len(kinds), **{**SIZES, **fields})
    model = spread_weights(ToyForCausalLM(config)).eval()
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_all_attention_is_the_llama():
    base = spread_weights(llama(vocab_size=50, num_key_value_heads=1)).eval()
    model = ToyForCausalLM.from_base(base)
    ids = random_ids(2, 9)
    close(model(ids, labels=ids).loss, base(ids, labels=ids).loss)
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert isinstance(model, LlamaForCausalLM) and not model.base_report.new


MIXTURES = (
    ("mean", "attention", "values", "none"),
    ("attention", "values", "mean", "attention"),
    ("mean", "mean"),
    ("none", "mean", "none"),
    ("attention", "values"),
)


@pytest.mark.parametrize("kinds", MIXTURES, ids="-".join)
def test_every_cache_computes_the_full_forward(kinds):
    model, ids = make(*kinds), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    for options in (
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 4},
        {"prefill_chunk_size": 4},
    ):
        cached = model.generate(ids, attention_mask=mask, disable_compile=True, **settings, **options)
        close(torch.stack(cached.logits), torch.stack(plain.logits))
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=4, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("kinds", MIXTURES[:3], ids="-".join)
def test_caches_of_the_caller(kinds):
    model, ids = make(*kinds), random_ids(2, 9)
    full = model(ids).logits
    early = StaticCache(config=model.config, max_cache_len=12)
    early.early_initialization(2, 2, 4, torch.float32, torch.device("cpu"))
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, 12), early):
        steps = [model(piece, **{CACHE: cache}, use_cache=True).logits for piece in ids.split([4, 1, 4], dim=1)]
        close(torch.cat(steps, 1), full)
        assert int(cache.get_seq_length()) == 9
    quantised = QuantizedCache("fp8", model.config)
    steps = [model(piece, **{CACHE: quantised}).logits for piece in ids.split([4, 1, 4], dim=1)]
    close(steps[0], full[:, :4])
    # the rest within the error of eight-bit quantisation
    assert (torch.cat(steps, 1) - full).abs().mean() < 0.1 * full.abs().mean()


def test_values_only_are_kept_without_keys_and_with_a_learned_prefix():
    model, ids = make("attention", "values"), random_ids(2, 9)
    cache = model(ids, use_cache=True)[CACHE]
    assert cache.layers[1].keys.shape == (2, 2, 9, 0) and cache.layers[1].values.shape == (2, 2, 9, 4)
    prefix = torch.randn(2, 2, 2, 2, 3, 4)
    filled = DynamicCache(tuple((layer[0], layer[1]) for layer in prefix))
    model(ids, **{CACHE: filled}, attention_mask=torch.ones(2, 12))
    assert torch.equal(filled.layers[1].values[:, :, :3], prefix[1, 1])


def test_states_refuse_what_they_cannot_serve():
    model, ids = make("mean", "attention"), random_ids(2, 6)
    prefix = DynamicCache(tuple((layer[0], layer[1]) for layer in torch.randn(2, 2, 2, 2, 3, 4)))
    with pytest.raises(ValueError, match="learned prefix"):
        model(ids, **{CACHE: prefix})
    with pytest.raises(ValueError, match="token pairs"):
        model(ids, attention_mask=torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match="restart within a row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="without an assistant"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="past_key_values"):
        model.model(ids, cache=cache, past_key_values=cache)


def test_early_exit_runs_the_first_layers_only():
    model, ids = make("attention", "values", "attention", "attention"), random_ids(1, 9)
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=6, do_sample=False, assistant_early_exit=2)
    assert torch.equal(drafted, greedy)
    model.config.num_hidden_layers = 2
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3


def test_training_with_gradient_checkpointing():
    model, ids = make("mean", "attention", "values", "none").train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=True).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, gradient)


def test_records_and_logits_to_keep():
    model, ids = make("mean", "attention", "values"), random_ids(2, 9)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 2
    close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
    assert model(ids[:0]).logits.shape == (0, 9, 50)


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": True},
        {"norm_type": "layer_norm", "norm_bias": False, "gated_mlp": False},
        {"sliding_window": 3},
        {"head_dim": 6, "num_attention_heads": 6},
        {"attention_bias": True, "attention_output_bias": False, "tie_word_embeddings": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_options(fields, tmp_path):
    model, ids = make("attention", "attention", **fields), random_ids(2, 9)
    full = model(ids).logits
    cache = None
    steps = []
    for piece in ids.split([4, 1, 4], dim=1):
        output = model(piece, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        steps.append(output.logits)
    close(torch.cat(steps, 1), full)
    assert all((parameter.grad is None) for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again, info = ToyForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(ids).logits, full)


def test_a_window_is_that_of_mistral():
    model, ids = make("attention", "attention", sliding_window=3), random_ids(1, 9)
    changed = ids.clone()
    changed[0, 0] = changed[0, 0] % 49 + 1
    different = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert different.tolist() == [True] * 5 + [False] * 4


def test_heads_of_transformers():
    config = ToyConfig(mixer_types=["mean", "attention"], num_hidden_layers=2, num_labels=3, **SIZES)
    model = ToyForSequenceClassification(config).eval()
    output = model(random_ids(2, 6), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3) and output.loss.isfinite()
    encoder = ToyForTokenClassification(ToyEncoderConfig(num_hidden_layers=2, num_labels=3, **SIZES)).eval()
    assert encoder(random_ids(2, 6), labels=random_ids(2, 6) % 3).logits.shape == (2, 6, 3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_encoder_sees_both_sides_and_no_padding(implementation):
    set_seed(0)
    model = spread_weights(ToyForMaskedLM(ToyEncoderConfig(num_hidden_layers=2, **SIZES))).eval()
    model.set_attn_implementation(implementation)
    ids = random_ids(2, 6)
    changed = ids.clone()
    changed[:, -1] = changed[:, -1] % 49 + 1
    logits = model(ids, labels=ids).logits
    assert (model(changed).logits[:, 0] != logits[:, 0]).any(-1).all()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    close(model(ids, attention_mask=mask).logits[:1, :4], model(ids[:1, :4]).logits)
    assert model(ids).keys() == {"logits"}
