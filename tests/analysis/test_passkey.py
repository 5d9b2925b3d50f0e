"""The pass-key test: prompts, scores and tables, on models with known answers."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_attn.analysis.passkey import PasskeyAnswer, PasskeyResult, passkey_prompt, passkey_test, plot_passkey
from tests.batteries.text import byte_tokenizer


class Reader:
    """Finds the number in the last `window` tokens of its prompt, like a perfect model with that context length."""

    device = torch.device("cpu")

    def __init__(self, window: int):
        self.tokenizer, self.window, self.prompts = byte_tokenizer(), window, []

    def generate(self, ids, **arguments):
        assert ids.shape[0] == 1 and ids.shape == arguments["attention_mask"].shape
        self.prompts.append(self.tokenizer.decode(ids[0]))
        self.arguments = arguments
        found = re.search(r"The pass key is (\d+)\.", self.tokenizer.decode(ids[0, -self.window :]))
        answer = self.tokenizer(f" {found.group(1)}, 7" if found else " lost.")["input_ids"]
        return torch.cat([ids, torch.tensor([answer])], dim=1)


def test_prompts_have_their_length_and_the_number_at_its_depth():
    tokenizer = byte_tokenizer()
    places = []
    for depth in (0, 0.5, 1):
        ids = passkey_prompt(tokenizer, 2000, depth, 4711)
        text = tokenizer.decode(ids)
        assert 1900 < len(ids) <= 2000
        assert text.count("4711") == 2 and text.endswith("The pass key is")
        places.append(text.index("The pass key is 4711") / len(text))
    assert places[0] < 0.06 and abs(places[1] - 0.5) < 0.06 and places[2] > 0.9


def test_prompts_begin_as_the_tokenizer_begins():
    from tokenizers.processors import TemplateProcessing

    backend = byte_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="</s>")
    with_bos, without = (passkey_prompt(t, 600, 0.5, 1) for t in (tokenizer, byte_tokenizer()))
    assert with_bos == [0, *without]


def test_a_model_with_a_short_context_finds_what_is_near():
    model = Reader(window=600)
    result = passkey_test(model, model.tokenizer, [500, 2000], [0.1, 0.9], [2, 3], progress=False, cache_top_k=4)
    assert result.accuracy(500) == 1
    assert (result.accuracy(2000, 0.1), result.accuracy(2000, 0.9)) == (0, 1)
    assert [result.num_prompts(length) for length in result.lengths] == [4, 6]
    assert str(result).splitlines() == [
        " tokens   at 0.1   at 0.9      all  prompts",
        "    500     100%     100%     100%        4",
        "   2000       0%     100%      50%        6",
    ]
    assert model.arguments["cache_top_k"] == 4 and not model.arguments["do_sample"]
    assert len({answer.passkey for answer in result.answers}) == 10
    again = passkey_test(Reader(10), model.tokenizer, [500, 2000], [0.1, 0.9], [2, 3], progress=False)
    assert [answer.passkey for answer in again.answers] == [answer.passkey for answer in result.answers]


@pytest.mark.parametrize(
    ("answer", "is_correct"), [(" 42.", True), (" is 42", True), (" 421", False), (" 4 2", False), ("", False)]
)
def test_the_first_whole_number_counts(answer, is_correct):
    assert PasskeyAnswer(100, 0.5, 42, answer).is_correct == is_correct


def test_plot(tmp_path):
    result = PasskeyResult((PasskeyAnswer(1024, 0.5, 42, "42"), PasskeyAnswer(2048, 0.5, 42, "no")))
    plot_passkey({"base": result, "other": result}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"depth must be between 0 and 1, got 1\.5"):
        passkey_prompt(tokenizer, 900, 1.5, 1)
    with pytest.raises(ValueError, match=r"needs at least \d+ tokens, got num_tokens=90"):
        passkey_prompt(tokenizer, 90, 0.5, 1)
    with pytest.raises(ValueError, match="trials has 3 entries for 2 lengths"):
        passkey_test(SimpleNamespace(), tokenizer, [500, 600], trials=[1, 2, 3])
