"""Tokenizers, ListOps and plots over the text."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hf_attn import attention_over_text, byte_tokenizer, plot_attention_over_text
from hf_attn.modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from hf_attn.modeling.wide_attention.listops import SYMBOLS, Difficulty, evaluate, generate
from hf_attn.modeling.wide_attention.modeling_wide_attention import WideTransformerForSequenceClassification
from hf_attn.modeling.wide_attention.tokenization import symbol_tokenizer


TEXTS = (" Grüße <pad>\n日本  ok\x00\xa0�", "", " ", "a\r\nb", "<unk></s>", "".join(map(chr, range(1, 600))))


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def test_tokens_are_bytes(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert ids == [byte + 1 for byte in text.encode()]
            assert tokenizer.decode(ids) == text
        assert len(tokenizer) == 257 and tokenizer.pad_token_id == 0


def test_padding_and_truncation():
    tokenizer = byte_tokenizer(max_length=5)
    batch = tokenizer(["abcdefg", "é"], padding=True, truncation=True)
    assert batch["input_ids"] == [[98, 99, 100, 101, 102], [196, 170, 0, 0, 0]]
    assert batch["attention_mask"][1] == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="positive integer, got 0"):
        byte_tokenizer(0)


def test_symbols():
    tokenizer = symbol_tokenizer(SYMBOLS)
    assert len(tokenizer) == 17
    assert tokenizer("[MAX 2 9 ] ?")["input_ids"] == [13, 4, 11, 16, 1]
    with pytest.raises(ValueError, match="must be unique"):
        symbol_tokenizer(["a", "a"])


def test_pipeline(tmp_path):
    model = WideTransformerForSequenceClassification(WideTransformerConfig.from_variant("tiny", vocab_size=257)).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer(64).save_pretrained(tmp_path)
    texts = ["short", "a much longer text " * 9]
    pipe = pipeline("text-classification", model=str(tmp_path))
    alone = [pipe(text, truncation=True)[0]["score"] for text in texts]
    together = [result["score"] for result in pipe(texts, batch_size=2, truncation=True, padding=True)]
    assert together == pytest.approx(alone, abs=1e-6)


# --- ListOps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM 9 8 7 ]", 4),
        ("[MED 1 9 5 ]", 5),
        ("[MED 1 2 8 9 ]", 5),
        ("[MED 2 [SM 5 5 ] ]", 1),
    ],
)
def test_values(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["", "[MAX 1 2", "1 2", "[MAX ]", "12", "] 1", "[AVG 1 2 ]"])
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(ValueError, match=r"not one complete expression|is not allowed"):
        evaluate(expression)


def test_expressions_are_different_and_of_the_standard_difficulty():
    pairs = list(generate(30, seed=3))
    assert pairs == list(generate(30, seed=3)) and pairs != list(generate(30, seed=4))
    assert len({expression for expression, _ in pairs}) == 30
    for expression, value in pairs:
        symbols = expression.split()
        assert 500 <= len(symbols) <= 2000 and set(symbols) <= set(SYMBOLS)
        assert evaluate(expression) == value
        depth = largest = 0
        for symbol in symbols:
            depth += (symbol[0] == "[") - (symbol == "]")
            largest = max(largest, depth)
        assert largest <= 10


def test_difficulties_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="never reached: the longest expression has 8 symbols"):
        Difficulty(max_depth=1, max_arguments=6, min_length=9)
    with pytest.raises(ValueError, match="at most max_length"):
        Difficulty(min_length=30, max_length=20)
    with pytest.raises(RuntimeError, match="of 1000 distinct expressions"):
        list(generate(1000, Difficulty(max_depth=1, max_arguments=2, min_length=1)))


# --- plots --------------------------------------------------------------------------------------------------------------


def test_attention_of_every_head_over_the_text():
    model = WideTransformerForSequenceClassification(
        WideTransformerConfig.from_variant("tiny", vocab_size=257)
    ).train()
    tokens, weights = attention_over_text(model, byte_tokenizer(), "Grün!")
    assert tokens == ["G", "r", "ü", "", "n", "!"] and weights.shape == (4, 6)
    assert model.training and model.config._attn_implementation == "sdpa"
    model.eval().set_attn_implementation("eager")
    ids = torch.tensor([byte_tokenizer()("Grün!")["input_ids"]])
    expected = model(ids, output_attentions=True).attentions[-1][0, :, 0, 1:]
    torch.testing.assert_close(weights, expected.detach())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"pooling": "mean"}, "no class token"), ({"attention_type": "linear"}, "single tokens")],
)
def test_models_without_such_attention_are_refused(overrides, message):
    config = WideTransformerConfig.from_variant("tiny", vocab_size=257, **overrides)
    with pytest.raises(ValueError, match=message):
        attention_over_text(WideTransformerForSequenceClassification(config), byte_tokenizer(), "text")


def test_the_text_is_drawn_once_for_each_head(tmp_path):
    pytest.importorskip("matplotlib")
    weights = torch.tensor([[0.1, 0.7, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    figure = plot_attention_over_text(["a", "$", "ü", ""], weights, width=3)
    assert [axis.get_ylabel() for axis in figure.axes] == ["head 0", "head 1"]
    shades = figure.axes[0].images[0].get_array()
    assert shades.shape == (2, 3) and shades.max() == shades[0, 1] == 1
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "$", "ü", "·"]
    figure.savefig(tmp_path / "attention.png")
    assert len(plot_attention_over_text(["a"], weights[:, :1], heads=[1]).axes) == 1
    with pytest.raises(ValueError, match="out of range"):
        plot_attention_over_text(["a"], weights[:, :1], heads=[2])
    with pytest.raises(ValueError, match="for 1 tokens"):
        plot_attention_over_text(["a"], weights)
