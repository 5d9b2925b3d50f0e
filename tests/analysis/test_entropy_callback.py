"""The callback that monitors the attention entropy."""

import copy
import json
import logging
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_attn.analysis.entropy_callback import AttentionEntropyCallback
from hf_attn.patching.sigma_reparam import SigmaReparamLayer, apply_sigma_reparam


TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=50))


@pytest.fixture
def input_ids() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 50, (2, 9))


@pytest.mark.parametrize("reparametrised", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_entropy_lies_between_its_bound_and_uniform_attention(kind, reparametrised, input_ids):
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**TINY, image_size=16, patch_size=4))
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        model = llama() if kind == "llama" else BertForSequenceClassification(BertConfig(**TINY, vocab_size=50))
        batch = {"input_ids": input_ids}
    if reparametrised:
        apply_sigma_reparam(model, init="unit")
    model.train()
    implementation = model.config._attn_implementation
    callback = AttentionEntropyCallback(batch)
    entry = callback.measure(model, step=0)
    assert model.training and model.config._attn_implementation == implementation
    assert [len(heads) for heads in entry["entropy"]] == [4, 4, 4]
    for heads, bound in zip(entry["entropy"], entry["bound"], strict=True):
        assert 0 <= bound <= min(heads) + 1e-5
        assert max(heads) <= entry["uniform"] + 1e-5


def test_watching_does_not_change_a_reparametrised_model(input_ids):
    model = llama()
    apply_sigma_reparam(model)
    for module in model.modules():
        if isinstance(module, SigmaReparamLayer):  # far from convergence, where a power iteration makes a difference
            torch.nn.init.normal_(module.u)
    before = copy.deepcopy(model.state_dict())
    entry = AttentionEntropyCallback({"input_ids": input_ids}).measure(model.train(), step=0)
    assert None not in entry["bound"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_diverged_weights_have_no_bound(input_ids):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    bounds = AttentionEntropyCallback({"input_ids": input_ids}).measure(model, step=0)["bound"]
    assert bounds[0] is not None and bounds[1:] == [None, None]


def test_trainer_logs_it_and_the_curves_can_be_kept(input_ids, tmp_path):
    callback = AttentionEntropyCallback({"input_ids": input_ids, "labels": input_ids}, every_steps=2)
    arguments = TrainingArguments(tmp_path, max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in input_ids]
    trainer = Trainer(llama(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [0, 2, 4]
    logged = [entry["attention_entropy"] for entry in trainer.state.log_history if "attention_entropy" in entry]
    assert len(logged) == 3
    callback.save(tmp_path / "entropy.json")
    assert json.loads((tmp_path / "entropy.json").read_text()) == callback.history
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    callback.plot(tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").read_bytes()[:4] == b"\x89PNG"


def test_collapse_is_reported(input_ids, caplog):
    model = llama()
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.k_proj):
            projection.weight.mul_(1000)
    logger = logging.getLogger("transformers")
    logger.propagate = True
    logging.getLogger("hf_attn").propagate = True
    callback = AttentionEntropyCallback({"input_ids": input_ids})
    with caplog.at_level(logging.WARNING):
        callback.measure(model, step=7)
    messages = [record.getMessage() for record in caplog.records if "has collapsed" in record.getMessage()]
    assert len(messages) == 1 and "Step 7" in messages[0] and "layer 1" in messages[0]


def test_model_without_attention_maps():
    class Mute(LlamaForCausalLM):
        def forward(self, *args, output_attentions=None, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="returns no attention maps"):
        AttentionEntropyCallback({"input_ids": torch.ones(1, 3, dtype=torch.long)}).measure(
            Mute(LlamaConfig(**TINY, vocab_size=50)), 0
        )


@pytest.mark.parametrize(("argument", "value"), [("every_steps", 0), ("collapse_below", 1.5)])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=argument):
        AttentionEntropyCallback({}, **{argument: value})


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("key", ["labels", "decoder_input_ids"])
def test_an_encoder_decoder_has_layers_of_three_kinds(key):
    ids = torch.randint(2, 20, (3, 6))
    entry = AttentionEntropyCallback({"input_ids": ids, key: ids[:, :4]}).measure(t5(), 0)
    assert [len(heads) for heads in entry["entropy"]] == [2] * 6
    assert entry["bound"] == [None] * 6
    # A row sees at most all keys; the first row of the decoder sees one.
    assert all(head <= math.log(6) + 1e-5 for layer in entry["entropy"] for head in layer)
    with pytest.raises(ValueError, match="needs decoder_input_ids or labels"):
        AttentionEntropyCallback({"input_ids": ids}).measure(t5(), 0)


def test_lists_are_inputs_and_other_things_are_refused(tmp_path):
    watch = AttentionEntropyCallback({"input_ids": [[2, 3, 4]], "labels": [[5, 6]]})
    with pytest.raises(ValueError, match="Nothing has been measured yet"):
        watch.plot(tmp_path / "entropy.png")
    watch.measure(t5(), 0)
    watch.plot(tmp_path / "entropy.png")
    with pytest.raises(ValueError, match="must be tensors or rectangular lists"):
        AttentionEntropyCallback({"input_ids": [[2, 3], [4]]})
    with pytest.raises(ValueError, match="dictionary of the inputs of the model, got list"):
        AttentionEntropyCallback([[2, 3]])
