"""Tests of every causal language model: empty batches, ONNX with dynamic batch size and length."""

import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_attn.catalog import families
from tests.batteries.families import tiny_config


CAUSAL = [family.model_type for family in families() if "AutoModelForCausalLM" in family.models]
every_family = pytest.mark.parametrize("model_type", CAUSAL)
#: families that refuse to be exported with free sizes and a mask -> what the error says
NOT_EXPORTED = {
    "combiner": "read off the values of the mask where sequences begin; run the model in PyTorch",
    "token_mixer": "cannot be exported with an attention_mask.*Export the model without a mask",
}


def tiny_model(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


@every_family
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no_cache"])
def test_an_empty_batch_has_empty_logits_and_gradients_of_zero(model_type, options):
    model, ids = tiny_model(model_type), torch.zeros(0, 7, dtype=torch.long)
    for more in ({}, {"attention_mask": ids}):
        logits = model(input_ids=ids, **options, **more).logits
        assert logits.shape == (0, 7, model.config.vocab_size)
    logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def inputs(model_type, batch_size, length):
    ids = torch.randint(4, tiny_config(model_type).vocab_size - 2, (batch_size, length))
    mask = torch.ones_like(ids)
    mask[0, length - length // 3 :] = 0
    return ids, mask


FREE = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
SHAPES = {"input_ids": FREE, "attention_mask": FREE}


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in NOT_EXPORTED])
def test_onnx_computes_the_same_at_other_sizes(model_type, tmp_path):
    model, path = Logits(tiny_model(model_type)), tmp_path / "model.onnx"
    torch.onnx.export(model, inputs(model_type, 2, 12), path, dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((2, 12), (1, 7), (3, 21), (4, 33)):
        ids, mask = inputs(model_type, *size)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask)
        kept = mask.bool()
        torch.testing.assert_close(torch.from_numpy(logits)[kept], expected[kept], atol=1e-5, rtol=1e-5, msg=f"{size}")


@pytest.mark.parametrize("model_type", NOT_EXPORTED)
def test_what_cannot_have_free_sizes_is_not_exported(model_type):
    model = Logits(tiny_model(model_type))
    with pytest.raises(ValueError, match=NOT_EXPORTED[model_type]):
        torch.export.export(model, inputs(model_type, 2, 12), dynamic_shapes=SHAPES, strict=False)


def test_token_mixers_are_exported_without_a_mask():
    model, free = tiny_model("token_mixer"), {"input_ids": FREE, "use_cache": None}
    (ids, _), (others, _) = inputs("token_mixer", 2, 12), inputs("token_mixer", 3, 19)
    exported = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=free, strict=False
    ).module()
    logits = exported(input_ids=others, use_cache=False).logits
    torch.testing.assert_close(logits, model(others).logits, atol=1e-5, rtol=1e-5)


def test_constant_maps_are_not_exported():
    config = tiny_config("deconstructing_attention", layer_kinds=["rnd_emb_qk", "standard"])
    model = Logits(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ValueError, match="Models with rnd_emb_qk cannot be exported"):
        torch.export.export(model, inputs("deconstructing_attention", 2, 12), strict=False)
