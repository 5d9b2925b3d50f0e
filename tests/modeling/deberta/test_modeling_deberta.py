"""The enhanced mask decoder, conversion of both layouts, filling masks."""

import pytest
import torch
from transformers import DebertaConfig, DebertaForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM, pipeline

from hf_attn import DebertaEMDConfig, DebertaEMDForMaskedLM, DebertaEMDModel, from_official
from hf_attn.checkpoints.official import ConversionError
from scripts.run_deberta import train_tokenizer


ARGUMENTS = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
V3 = {**ARGUMENTS, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}


def official_state(version: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A masked language model in the layout of the original files, which transformers' own classes nearly have."""
    torch.manual_seed(seed)
    if version == 1:
        model = DebertaForMaskedLM(DebertaConfig(**ARGUMENTS, legacy=False))
    else:
        model = DebertaV2ForMaskedLM(DebertaV2Config(**V3, legacy=False))
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in model.state_dict().items()}
    state["deberta.embeddings.position_embeddings.weight"] = torch.randn(24, 32) * 0.2
    return state


def make_model(**overrides) -> DebertaEMDForMaskedLM:
    torch.manual_seed(0)
    return DebertaEMDForMaskedLM(DebertaEMDConfig.from_variant("tiny", **overrides)).eval()


def make_batch(vocab_size: int = 60):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, vocab_size, (3, 15), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, -4:], mask[2, :3] = 0, 0
    labels = torch.full_like(input_ids, -100)
    labels[0, [1, 2, 14]], labels[2, 5] = input_ids[0, [1, 2, 14]], input_ids[2, 5]
    return input_ids, mask, labels


@pytest.mark.parametrize("version", (1, 3))
def test_encoder_of_a_converted_checkpoint_is_that_of_transformers(version):
    """The layout of v1 is converted to that of v2, with zero biases: the hidden states do not change."""
    state = official_state(version)
    arguments = ARGUMENTS if version == 1 else V3
    model = from_official("deberta", state, config=arguments)
    if version == 1:
        expected = DebertaForMaskedLM(DebertaConfig(**arguments, legacy=False))
    else:
        expected = DebertaV2ForMaskedLM(DebertaV2Config(**arguments, legacy=False))
    expected.load_state_dict(state, strict=False)
    expected.eval()
    input_ids, mask, _ = make_batch()
    with torch.no_grad():
        found = model.deberta(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        wanted = expected.deberta(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # transformers decodes the last hidden state without absolute positions, so the scores differ
        ours, theirs = (m(input_ids, attention_mask=mask).logits[mask.bool()] for m in (model, expected))
        assert (ours - theirs).abs().max() > 0.1 * theirs.std()


@pytest.mark.parametrize("implementation", ("eager", "sdpa", "flex_attention"))
@pytest.mark.parametrize(
    "overrides", ({}, {"conv_kernel_size": 3}, {"num_hidden_layers": 1}, {"position_biased_input": True})
)
def test_decoding_masked_positions_only_is_exact(implementation, overrides):
    model = make_model(**overrides)
    model.set_attn_implementation(implementation)
    input_ids, mask, labels = make_batch()
    chosen = labels != -100
    with torch.no_grad():
        everything = model(input_ids, attention_mask=mask).logits
        output = model(input_ids, attention_mask=mask, labels=labels)
        with_states = model(input_ids, attention_mask=mask, masked_positions=chosen, output_hidden_states=True)
    assert everything.shape == (3, 15, 99) and output.logits.shape == (4, 99)
    torch.testing.assert_close(output.logits, everything[chosen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_states.logits, output.logits, atol=1e-5, rtol=1e-5)
    assert len(with_states.hidden_states) == model.config.num_hidden_layers + 1
    expected = torch.nn.functional.cross_entropy(everything[chosen], labels[chosen])
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


def test_mask_of_pairs_is_followed_for_chosen_positions():
    model = make_model()
    input_ids, _, labels = make_batch()
    pairs = torch.ones(3, 15, 15, dtype=torch.long).tril()
    with torch.no_grad():
        everything = model(input_ids, attention_mask=pairs).logits
        chosen = model(input_ids, attention_mask=pairs, masked_positions=labels != -100).logits
    torch.testing.assert_close(chosen, everything[labels != -100], atol=1e-5, rtol=1e-5)


def test_nothing_to_predict():
    model = make_model().train()
    input_ids, mask, _ = make_batch()
    output = model(input_ids, attention_mask=mask, labels=torch.full_like(input_ids, -100))
    output.loss.backward()
    assert output.loss == 0 and output.logits.shape == (0, 99)


def test_backbone_loads_from_a_masked_language_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    backbone, info = DebertaEMDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again, info = DebertaEMDForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    input_ids, mask, _ = make_batch()
    with torch.no_grad():
        assert torch.equal(again(input_ids, attention_mask=mask).logits, model(input_ids, attention_mask=mask).logits)
    assert torch.equal(backbone.encoder.rel_embeddings.weight, model.deberta.encoder.rel_embeddings.weight)


def test_fill_mask_pipeline(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat", "a dog sat on a log"], 300)
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path))
    guesses = fill("the cat [MASK] on the mat", top_k=3)
    assert type(fill.model) is DebertaEMDForMaskedLM
    assert len(guesses) == 3 and guesses[0]["score"] >= guesses[1]["score"]


def test_resized_embeddings_have_a_bias():
    model = make_model()
    model.resize_token_embeddings(120)
    input_ids, mask, _ = make_batch()
    assert model(input_ids, attention_mask=mask).logits.shape == (3, 15, 120)


@pytest.mark.parametrize(
    ("variant", "backbone"),
    (
        ("base", 99_998_208),
        ("large", 353_691_648),
        ("v2-xlarge", 687_831_552),
        ("v3-xsmall", 21_491_712),
        ("v3-small", 42_923_520),
        ("v3-base", 85_450_752),
        ("v3-large", 302_837_760),
    ),
)
def test_published_sizes(variant, backbone):
    with torch.device("meta"):
        model = DebertaEMDModel(DebertaEMDConfig.from_variant(variant))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = model.embeddings.word_embeddings.weight.numel()
    if variant in ("base", "large"):
        # the layout of v2 has biases where v1 has none: of the keys and of the positions as keys
        backbone += model.config.num_hidden_layers * 2 * model.config.hidden_size
    assert parameters - words == backbone


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_discriminator_names_the_generator_file():
    state = official_state(3) | {"mask_predictions.dense.weight": torch.zeros(32, 32)}
    with pytest.raises(ConversionError, match=r"pytorch_model\.generator\.bin"):
        from_official("deberta", state, config=V3)


@pytest.mark.parametrize("missing", ("lm_predictions", "position_embeddings"))
def test_checkpoint_without_mask_decoder(missing):
    state = {name: tensor for name, tensor in official_state(3).items() if missing not in name}
    with pytest.raises(ConversionError, match=f"no .*{missing}"):
        from_official("deberta", state, config=V3)


def test_unknown_key():
    with pytest.raises(ConversionError, match="surprise"):
        from_official("deberta", official_state(3) | {"deberta.surprise": torch.zeros(1)}, config=V3)


def test_labels_out_of_range_and_texts_too_long():
    model = make_model()
    input_ids, mask, labels = make_batch()
    labels[0, 1] = 99
    with pytest.raises(ValueError, match="Label 99 is not a token"):
        model(input_ids, attention_mask=mask, labels=labels)
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="length 0"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="embedding_size"):
        make_model(embedding_size=16)
    with pytest.raises(ValueError, match="c2p and p2c"):
        DebertaEMDConfig.from_variant("tiny", pos_att_type="p2p")
