"""The exact shortcut of one softmax layer with a class token."""

import pytest
import torch
from torch import nn

from hf_attn.modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from hf_attn.modeling.wide_attention.modeling_wide_attention import WideTransformerForSequenceClassification
from tests.batteries.imaging import randomize


def make_model(**overrides) -> WideTransformerForSequenceClassification:
    config = WideTransformerConfig.from_variant("tiny", **{"num_hidden_layers": 1, **overrides})
    return randomize(WideTransformerForSequenceClassification(config))


def padded_ids() -> torch.Tensor:
    ids = torch.randint(1, 99, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[1, 17:] = 0
    ids[2, 1:] = 0
    return ids


@pytest.fixture(params=[False, True], ids=["direct", "table"])
def table(request) -> bool:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("biases", [False, True])
def test_folded_is_full(table, biases):
    model, ids = make_model(attention_bias=biases), padded_ids()
    expected = model(ids)
    assert model.fold(table=table) is model
    full_calls = []
    model.model.register_forward_hook(lambda *_: full_calls.append(1))
    found = model(ids, labels=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        found.loss, nn.functional.cross_entropy(expected.logits, torch.tensor([0, 1, 0])), atol=1e-6, rtol=1e-6
    )
    embedded = model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=ids != 0)
    torch.testing.assert_close(embedded.logits, expected.logits, atol=1e-6, rtol=1e-6)
    assert not full_calls
    assert torch.equal(model.unfold()(ids).logits, expected.logits) and full_calls


@torch.no_grad()
def test_a_long_text_of_the_published_size(table):
    model = randomize(WideTransformerForSequenceClassification(WideTransformerConfig.from_variant("byte_imdb_1x16")))
    ids = torch.randint(1, 257, (2, 1000), generator=torch.Generator().manual_seed(0))
    ids[1, 800:] = 0
    expected = model(ids).logits
    torch.testing.assert_close(model.fold(table=table)(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_low_precision_is_no_worse_than_the_full_computation(table):
    model, ids = make_model(), padded_ids()
    exact = model(ids).logits
    model.to(torch.bfloat16)
    error = (model(ids).logits.float() - exact).abs().max()
    found = model.fold(table=table)(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= 2 * error + 2**-8 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["embed_tokens", "cls_token", "q_proj", "k_proj", "v_proj", "input_layernorm", "norm"]
)
def test_changed_weights_are_noticed(table, name):
    model, ids = make_model().fold(table=table), padded_ids()
    before = model(ids).logits
    module = next(module for path, module in model.named_modules() if path.endswith(f".{name}"))
    module.weight.mul_(1.5)
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, model.unfold()(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_loaded_and_cast_weights_are_noticed(table):
    model, other, ids = make_model().fold(table=table), make_model(), padded_ids()
    model(ids)
    for parameter in other.parameters():
        parameter.add_(0.1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.double()(ids).logits, other.double()(ids).logits, atol=1e-10, rtol=1e-10)


def test_what_it_does_not_serve_is_computed_in_full(table):
    model, ids = make_model().fold(table=table), padded_ids()
    model(ids, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
    assert output.attentions[0].shape == (3, 4, 41, 41) and len(output.hidden_states) == 2
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_inference_mode(table):
    model, ids = make_model().fold(table=table), padded_ids()
    with torch.inference_mode():
        inside = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, inside)


def test_it_is_not_saved(tmp_path):
    model = make_model().fold()
    model.save_pretrained(tmp_path)
    again = WideTransformerForSequenceClassification.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys() and again._folded is None


def test_a_large_vocabulary_has_no_table_unless_it_is_asked_for():
    with torch.device("meta"):
        config = WideTransformerConfig.from_variant("byte_imdb_1x16", vocab_size=30_000)
    model = WideTransformerForSequenceClassification(config).eval()
    assert not model.fold()._folded.has_table
    assert make_model().fold()._folded.has_table


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 2}, "2 layers"),
        ({"pooling": "mean"}, "pooling='mean'"),
        ({"attention_type": "linear"}, "attention_type='linear'"),
        ({"qk_norm": True}, "qk_norm"),
        ({"norm_type": "rms_norm"}, "not a LayerNorm"),
    ],
)
def test_models_that_cannot_be_folded_say_why(overrides, message):
    with pytest.raises(ValueError, match=f"cannot be folded: .*{message}"):
        make_model(**overrides).fold()


def test_a_training_model_and_adapters_are_refused():
    with pytest.raises(ValueError, match="training"):
        make_model().train().fold()
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="SEQ_CLS")).eval()
    with pytest.raises(ValueError, match="merge adapters first"):
        adapted.get_base_model().fold()


@torch.no_grad()
def test_adapters_added_later_are_not_ignored():
    peft = pytest.importorskip("peft")
    model, ids = make_model().fold(), padded_ids()
    before = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-4
