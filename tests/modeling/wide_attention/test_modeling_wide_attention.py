"""Wide transformers: properties from the paper, documents, training and bad input."""

import math
from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from hf_attn import AutoModelForDocumentMatching, aspect_ratio, from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from hf_attn.modeling.wide_attention.modeling_wide_attention import (
    WideTransformerForDocumentMatching,
    WideTransformerForSequenceClassification,
    WideTransformerModel,
)
from tests.batteries.imaging import randomize


tiny_config = partial(WideTransformerConfig.from_variant, "tiny")


def tiny_model(**overrides) -> WideTransformerForSequenceClassification:
    return randomize(WideTransformerForSequenceClassification(tiny_config(**overrides)))


def some_ids(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(0))


def meta_model(variant: str, model_class=WideTransformerForSequenceClassification):
    with torch.device("meta"):
        return model_class(WideTransformerConfig.from_variant(variant)).eval()


# --- sizes ------------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "byte_imdb_4x4": 3_486_722,
    "byte_imdb_2x8": 2_433_538,
    "byte_imdb_1x16": 1_906_946,
    "heads48_6x8": 20_089_858,
    "heads48_3x16": 13_784_578,
    "heads48_2x24": 11_682_818,
    "heads48_1x48": 9_581_058,
    "listops_4x8": 8_949_258,
    "listops_2x16": 6_844_938,
    "listops_1x32": 5_792_778,
}


def test_parameters_of_the_reconstructed_variants():
    variants = [name for name in WideTransformerConfig.variants if not name.startswith("matching")]
    assert {name: meta_model(name).num_parameters() for name in variants} == PARAMETERS


@pytest.mark.parametrize("variant", ["matching_4x4", "heads48_1x48"])
def test_parameters_of_a_layer_in_closed_form(variant):
    model = meta_model(variant, WideTransformerModel)
    config = model.config
    width, inner, mlp = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    count = sum(parameter.numel() for parameter in model.layers[0].parameters())
    assert count == 4 * width * inner + 2 * width * mlp + mlp + 5 * width


def test_attention_costs_the_same_along_a_family():
    def flops(variant: str) -> dict[str, int]:
        model = WideTransformerForSequenceClassification(WideTransformerConfig.from_variant(variant)).eval()
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(1, 399, dtype=torch.long))
        return counter.get_flop_counts()["Global"]

    counts = [flops(variant) for variant in ("byte_imdb_4x4", "byte_imdb_1x16")]
    attention = [counts_of_one[torch.ops.aten.bmm] for counts_of_one in counts]
    # 4 n^2 d for each of the 16 heads
    assert attention[0] == attention[1] == 4 * 400**2 * 64 * 16
    assert sum(counts[0].values()) > 1.3 * sum(counts[1].values())


def test_aspect_ratio_keeps_the_heads_and_all_else():
    deep = WideTransformerConfig.from_variant("heads48_6x8", attention_type="linformer", num_labels=7)
    wide = aspect_ratio(deep, 1)
    assert (wide.num_hidden_layers, wide.num_attention_heads, wide.num_key_value_heads) == (1, 48, 48)
    assert wide.total_heads == deep.total_heads == 48 and deep.num_hidden_layers == 6
    differences = {name for name, value in deep.to_dict().items() if wide.to_dict()[name] != value}
    assert differences == {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "layer_types"}
    assert (
        WideTransformerConfig.from_variant("heads48_1x48").to_dict()
        == aspect_ratio(WideTransformerConfig.from_variant("heads48_6x8"), 1).to_dict()
    )
    with pytest.raises(
        ValueError, match=r"48 heads cannot be distributed evenly over num_layers=5\. Possible: 1, 2, 3, 4, 6"
    ):
        aspect_ratio(deep, 5)


# --- the skeleton -----------------------------------------------------------------------------------------------------


def test_starts_as_in_the_benchmark():
    torch.manual_seed(0)
    model = WideTransformerForSequenceClassification(WideTransformerConfig.from_variant("byte_imdb_1x16"))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.02)
    assert not model.model.cls_token.weight.any()
    weight = model.model.layers[0].self_attn.q_proj.weight
    bound = math.sqrt(6 / (256 + 1024))
    assert 0.99 * bound < weight.abs().max() <= bound
    assert model.model.layers[0].input_layernorm.eps == model.model.norm.eps == 1e-6
    assert model.config.hidden_act == "gelu_pytorch_tanh"


def test_positions_are_interleaved_sines_and_cosines():
    model = tiny_model()
    table = model.model.embed_positions(torch.zeros(1, 5, 24), torch.arange(5)[None])[0]
    for position in range(5):
        for pair in range(12):
            angle = position / 10000 ** (2 * pair / 24)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(table[position, 2 * pair : 2 * pair + 2], expected)


def test_padding_is_found_by_its_id_or_by_the_mask():
    model, ids = tiny_model(), some_ids()
    ids[1, 9:] = 0
    by_id = model(ids).logits
    ids[1, 9:] = 5
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, by_id)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask).logits, by_id)
    assert (model(ids).logits - by_id).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooling_ignores_padding(pooling):
    model = tiny_model(pooling=pooling)
    assert model.model.cls_token is None
    ids = some_ids(1)
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(ids).logits, model(padded).logits)
    states = model.model(ids).last_hidden_state
    pooled = states[:, 0] if pooling == "first" else states.mean(1)
    torch.testing.assert_close(model(ids).logits, model.classifier(pooled))


def test_trainer_is_told_to_divide_the_loss_by_the_accumulated_batches():
    assert not WideTransformerForSequenceClassification.accepts_loss_kwargs
    assert not WideTransformerForDocumentMatching.accepts_loss_kwargs


def test_it_learns_which_symbol_comes_first():
    torch.manual_seed(0)
    config = tiny_config(vocab_size=9, num_labels=8, num_hidden_layers=1, hidden_dropout_prob=0, attention_dropout=0)
    model = WideTransformerForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        ids = torch.randint(1, 9, (64, 6))
        model(ids, labels=ids[:, 0] - 1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.randint(1, 9, (200, 6))
    accuracy = (model.eval()(ids).logits.argmax(-1) == ids[:, 0] - 1).float().mean()
    assert accuracy > 0.9


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_are_encoded_alike_and_without_a_class_token():
    config = tiny_config()
    model = randomize(AutoModelForDocumentMatching.from_config(config))
    assert type(model) is WideTransformerForDocumentMatching
    assert model.config.pooling == "first" and config.pooling == "cls" and model.model.cls_token is None
    first, second = some_ids(2, 9), some_ids(2, 14).flip(1)
    second[0, 10:] = 0
    output = model(first, other_input_ids=second, output_hidden_states=True)
    alone = [model.model(text[None]).last_hidden_state[0, 0] for text in (second[0, :10], second[1])]
    states = [model.model(first).last_hidden_state[:, 0], torch.stack(alone)]
    torch.testing.assert_close(output.logits, model.classifier(torch.cat(states, dim=-1)))
    assert [layer.out_features for layer in model.classifier.layers] == [40, 20, 2]
    assert output.hidden_states[0].shape == (2, 2, 14, 24)


def test_a_model_of_documents_is_saved_and_loaded(tmp_path):
    model = randomize(WideTransformerForDocumentMatching(tiny_config()))
    model.save_pretrained(tmp_path)
    again = AutoModelForDocumentMatching.from_pretrained(tmp_path)
    ids = some_ids()
    torch.testing.assert_close(
        again(ids, other_input_ids=ids.flip(0)).logits, model(ids, other_input_ids=ids.flip(0)).logits
    )


def test_documents_come_in_pairs():
    model, ids = WideTransformerForDocumentMatching(tiny_config()).eval(), some_ids()
    with pytest.raises(ValueError, match="input_ids and other_input_ids"):
        model(ids)
    with pytest.raises(ValueError, match="got 2 and 1"):
        model(ids, other_input_ids=ids[:1])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_texts_that_do_not_fit_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="has 65 tokens, but the model has max_position_embeddings=64"):
        model(some_ids(1, 65))
    assert model(some_ids(1, 64)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="no tokens"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"padding in rows \[1\]"):
        model(torch.tensor([[3, 4], [0, 0]]))
    with pytest.raises(
        ValueError, match=r"attention_mask must have the shape \(batch, length\) = \(2, 13\), got \(2, 14\)"
    ):
        model(some_ids(), attention_mask=torch.ones(2, 14))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch is empty"):
        tiny_model()(torch.zeros(0, 5, dtype=torch.long))


def test_labels_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"from 0 to 1, got \[-1, 2\]"):
        tiny_model()(some_ids(), labels=torch.tensor([2, -1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_type": "reformer"}, "reformer"),
        (
            {"attention_type": "local", "attention_kwargs": {"window": 3}},
            "unknown entries window. Supported: block_size",
        ),
        ({"attention_type": "local", "attention_kwargs": {"block_size": 0}}, "block_size"),
        ({"attention_type": "linformer", "attention_kwargs": {"rank": 2.5}}, "must be an integer, got 2.5"),
        ({"attention_type": "performer", "attention_kwargs": {"kernel": "cos"}}, "one of relu, softmax, got 'cos'"),
        ({"attention_type": "sparse", "attention_kwargs": {"block_size": 8}}, "summary_size must be at most"),
        ({"num_key_value_heads": 2}, "does not support grouped heads"),
        ({"pooling": "max"}, "max"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**overrides)


# --- conversion -------------------------------------------------------------------------------------------------------


def reference_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    names = {"model.embed_tokens": "embed", "model.norm": "final_norm", "classifier.layers.0": "head.fc1"}
    names |= {"classifier.layers.1": "head.fc2"}
    for index in range(len(model.model.layers)):
        ours, theirs = f"model.layers.{index}", f"layers.{index}"
        names |= {f"{ours}.self_attn.{part}_proj": f"{theirs}.attn.{part}" for part in "qkv"}
        names |= {f"{ours}.self_attn.o_proj": f"{theirs}.attn.out", f"{ours}.input_layernorm": f"{theirs}.norm1"}
        names |= {f"{ours}.post_attention_layernorm": f"{theirs}.norm2"}
        names |= {f"{ours}.mlp.up_proj": f"{theirs}.mlp.fc1", f"{ours}.mlp.down_proj": f"{theirs}.mlp.fc2"}
    state = {}
    for name, tensor in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module in names:
            state[f"{names[module]}.{kind}"] = tensor
        elif module == "model.cls_token":
            state["cls"] = tensor[None, None]
        else:
            state[name.replace("model.layers", "layers").replace("self_attn", "attn")] = tensor
    return state


ARGUMENTS = {"head_dim": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 99, "mlp_dim": 40, "num_classes": 2}


@pytest.mark.parametrize(
    ("attention_type", "arguments"),
    [
        ("softmax", {}),
        ("linear", {}),
        ("linformer", {"rank": 4}),
        ("local", {"block_size": 4}),
        ("sliding", {"window": 5}),
        ("longformer", {"attention_kwargs": {"window_size": 5, "num_global_tokens": 1}}),
        ("synthesizer", {"rank": 3}),
        ("sinkhorn", {"block_size": 8}),
        ("sparse", {"block": 8, "summary": 2}),
        ("bigbird", {"block_size": 4}),
        ("performer", {"num_features": 9}),
    ],
)
def test_every_attention_type_converts(attention_type, arguments):
    ours = {"sliding": "longformer"}.get(attention_type, attention_type)
    kwargs = arguments.get("attention_kwargs", arguments)
    kwargs = {
        {"window": "window_size", "block": "block_size", "summary": "summary_size"}.get(k, k): v
        for k, v in kwargs.items()
    }
    model = tiny_model(attention_type=ours, attention_kwargs=kwargs)
    config = {**ARGUMENTS, "attention_type": attention_type, **arguments, "max_length": 64}
    converted = from_official("wide_attention", reference_weights(model), config=config)
    assert converted.config.attention_kwargs == model.config.attention_kwargs
    torch.testing.assert_close(converted(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers=2, but the configuration says 3"),
        ({"num_heads": 2}, "num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 does not divide"),
        ({"attention_type": "reformer"}, "reformer"),
        ({"attention_type": "linformer"}, "token_projection"),
        ({"window": 3}, "window"),
        ({"attention_kwargs": {"window": 3}}, "window"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_configurations_that_do_not_fit_the_weights_are_refused(changed, message):
    with pytest.raises(ConversionError, match=message):
        from_official("wide_attention", reference_weights(tiny_model()), config={**ARGUMENTS, **changed})


def test_a_missing_width_of_heads_is_asked_for():
    with pytest.raises(ConversionError, match="needs head_dim or num_heads"):
        from_official("wide_attention", reference_weights(tiny_model()), config={})


def test_lora_trains_without_naming_layers():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="SEQ_CLS"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trainable) and any("classifier" in name for name in trainable)
    model(input_ids=some_ids(), labels=torch.tensor([0, 1])).loss.backward()


def test_auto_class_makes_the_classifier():
    assert (
        type(AutoModelForSequenceClassification.from_config(tiny_config())) is WideTransformerForSequenceClassification
    )
