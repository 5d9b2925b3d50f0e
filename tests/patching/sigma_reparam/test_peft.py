"""Adapters on reparametrised layers: either correct or refused."""

import copy

import pytest
import torch
from torch import nn

from hf_attn.patching.sigma_reparam import SigmaReparamLayer, apply_sigma_reparam, fold_sigma_reparam

from .test_foreign_models import input_ids, tiny_llama


peft = pytest.importorskip("peft", reason="adapters need peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANDOM = {"target_modules": TARGETS, "r": 2, "init_weights": False}
RIGHT = {
    "lora": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False),
    "rslora": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False, use_rslora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(**RANDOM),
    "lokr": lambda: peft.LoKrConfig(**RANDOM),
    "vera": lambda: peft.VeraConfig(**RANDOM),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(
        target_modules=TARGETS, init_r=4, target_r=2, total_step=10, init_lora_weights=False
    ),
}
WRONG = {
    "dora": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights="olora"),
    "hra": lambda: peft.HRAConfig(**RANDOM),
    "boft": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "target_parameters": lambda: peft.LoraConfig(
        target_modules=[], target_parameters=["self_attn.q_proj.weight"], r=2
    ),
}


def reparametrised() -> nn.Module:
    model = tiny_llama()
    apply_sigma_reparam(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SigmaReparamLayer):
                layer.gamma.mul_(2)
    return model


@pytest.mark.parametrize("name", RIGHT)
def test_merging_keeps_what_the_adapted_model_computes(name):
    folded = copy.deepcopy(model := reparametrised())
    fold_sigma_reparam(folded)
    outputs = []
    for base in (folded, model):
        before = base(input_ids()).logits
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, RIGHT[name]()).eval()
        outputs.append(adapted(input_ids()).logits)
        assert (outputs[-1] - before).abs().max() > 1e-3
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(input_ids()).logits, outputs[-1], atol=1e-4, rtol=1e-3)
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(input_ids()).logits, outputs[-1], atol=1e-4, rtol=1e-3)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids()).logits, outputs[-1], atol=1e-4, rtol=1e-3)
    # An adapter does not know whether the base is folded.
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, SigmaReparamLayer)


@pytest.mark.parametrize("name", WRONG)
def test_adapters_that_compute_with_the_weight_say_fold_first(name):
    model = reparametrised()
    with pytest.raises(ValueError, match=r"would compute with the weight W.*fold_sigma_reparam"):
        peft.get_peft_model(model, WRONG[name]())
    fold_sigma_reparam(model := reparametrised())
    peft.get_peft_model(model, WRONG[name]())


def test_adapters_that_were_there_before():
    adapted = peft.get_peft_model(tiny_llama(), RIGHT["lora"]())
    with pytest.raises(ValueError, match=r"q_proj has a PEFT adapter.*merge_and_unload"):
        apply_sigma_reparam(adapted)
    assert not any(isinstance(layer, SigmaReparamLayer) for layer in adapted.modules())
    apply_sigma_reparam(adapted.merge_and_unload())
