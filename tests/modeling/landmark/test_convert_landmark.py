"""Official weights: the gradient that the golden case cannot test, and the published difference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from hf_attn.checkpoints.official import ConversionError, from_official
from hf_attn.cli import main
from tests.goldens.case import Case


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARGUMENTS = {**SIZES, "vocab_size": 40, "mem_id": 39, "mem_freq": 4, "train_context_length": 40}


def test_gradient_of_the_embeddings_is_as_exact_as_the_official_one():
    case = Case(Path(__file__).parents[2] / "goldens" / "landmark" / "llama_full_forward")
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = from_official("landmark", case.weights, config=case.config).to(dtype)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(dtype)
        model.set_attn_implementation("eager")
        logits = model(case.input("input_ids"), use_cache=False).logits
        (logits * case.input("grad_probe")).sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    ours, exact = gradients
    official = case.arrays["grad_embed_tokens"]
    error = (ours - exact).abs().max()
    assert error <= 2 * (official - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max()


@pytest.fixture
def difference(tmp_path):
    """A raw model in a folder, a difference, and the resulting weights."""
    set_seed(0)
    raw = LlamaForCausalLM(LlamaConfig(vocab_size=38, **SIZES))
    raw.save_pretrained(tmp_path / "raw")
    save_file(raw.state_dict(), tmp_path / "raw.safetensors")
    state = raw.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name].mean(0).expand(2, -1)])
    changes = {name: 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    recovered = {name: state[name] + change for name, change in changes.items()}
    table = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    for layer in range(2):
        changes[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    checksum = sum(tensor.double().sum().item() for tensor in recovered.values()) + 2 * table.sum().item()
    return tmp_path, changes, recovered, checksum


@pytest.mark.parametrize("source", ["raw", "raw.safetensors"])
def test_the_published_difference_is_added_to_the_raw_model(difference, source):
    folder, changes, recovered, checksum = difference
    arguments = {**ARGUMENTS, "difference_to": str(folder / source), "checksum": checksum}
    state = from_official("landmark", changes, arguments).state_dict()
    assert state.keys() == recovered.keys()
    for name, tensor in recovered.items():
        torch.testing.assert_close(state[name], tensor)


def test_a_key_that_the_model_does_not_have_is_named(difference):
    _, _, recovered, _ = difference
    with pytest.raises(ConversionError, match=r"model\.extra\.weight"):
        from_official("landmark", {**recovered, "model.extra.weight": torch.zeros(2)}, ARGUMENTS)


def test_a_wrong_raw_model_is_found(difference):
    folder, changes, _, checksum = difference
    arguments = {**ARGUMENTS, "difference_to": str(folder / "raw"), "checksum": checksum + 0.05}
    with pytest.raises(ConversionError, match=r"sum to .* instead of .*: this is not the right raw model"):
        from_official("landmark", changes, arguments)
    del arguments["checksum"], changes["model.norm.weight"]
    with pytest.raises(ConversionError, match=r"Missing tensors: none; unexpected tensors: model\.norm\.weight"):
        from_official("landmark", changes, arguments)


def test_the_command_recovers_a_folder(difference, capsys):
    """`difference_to` and `checksum` are in the file of `--config`."""
    folder, changes, recovered, checksum = difference
    save_file(changes, folder / "difference.safetensors")
    arguments = {**ARGUMENTS, "difference_to": str(folder / "raw"), "checksum": checksum}
    command = ["convert", "landmark", folder / "difference.safetensors", "--config", folder / "config.json"]
    for total, code in ((checksum, 0), (checksum + 0.05, 2)):
        (folder / "config.json").write_text(json.dumps({**arguments, "checksum": total}))
        assert main([*map(str, command), "--output", str(folder / f"output{code}")]) == code
    assert "this is not the right raw model" in capsys.readouterr().err
    state = AutoModelForCausalLM.from_pretrained(folder / "output0").state_dict()
    for name, tensor in recovered.items():
        torch.testing.assert_close(state[name], tensor)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConversionError, match="no official layout of landmark attention"):
        from_official("landmark", {"weight": torch.zeros(2)}, ARGUMENTS)


def test_a_vocabulary_without_the_landmark_is_refused():
    with pytest.raises(ConversionError, match="landmark_token_id"):
        from_official("landmark", {"model.embed_tokens.weight": torch.zeros(40, 32)}, {**ARGUMENTS, "mem_id": 40})
