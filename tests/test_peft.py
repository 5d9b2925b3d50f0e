"""PEFT on every causal language model of the catalogue, without naming target modules."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import set_seed

from hf_attn.catalog import Family, families
from tests.batteries.families import tiny_model


peft = pytest.importorskip("peft")

CAUSAL = [
    pytest.param(family, id=family.model_type) for family in families() if "AutoModelForCausalLM" in family.models
]


def causal_model(family: Family):
    """A small model of a family, always with the same weights, in eval mode."""
    set_seed(0)
    return tiny_model(family, "AutoModelForCausalLM")


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(1))


def perturbed(model):
    """Adapters start as the identity; random weights make them affect the output."""
    set_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", CAUSAL)
def test_lora_without_target_modules_trains(family):
    base = causal_model(family)
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM")).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)

    ids = token_ids(2, 12)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", CAUSAL)
def test_adapters_save_load_and_merge(family, tmp_path):
    ids = token_ids(2, 10)
    base = logits(causal_model(family), ids)
    model = perturbed(peft.get_peft_model(causal_model(family), peft.LoraConfig(task_type="CAUSAL_LM"))).eval()
    adapted = logits(model, ids)
    assert (adapted - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path)

    loaded = peft.PeftModel.from_pretrained(causal_model(family), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), adapted)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), base)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(causal_model(family))
    torch.testing.assert_close(logits(merged, ids), adapted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_adapted_model_generates(family):
    model = perturbed(peft.get_peft_model(causal_model(family), peft.LoraConfig(task_type="CAUSAL_LM"))).eval()
    ids = token_ids(1, 4)
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected = ids
    for _ in range(4):
        expected = torch.cat((expected, logits(model, expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, expected)


TUNERS = {
    "AdaLora": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=2),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", r=2),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, r=0),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=2),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("family", CAUSAL)
def test_other_tuners_know_the_family_too(family, tuner):
    model = peft.get_peft_model(causal_model(family), TUNERS[tuner]())
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)


_FRESH = """
import sys
{imports}
import torch
from transformers import AutoModelForCausalLM

base, adapter, expected = sys.argv[1:]
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
expected = torch.load(expected)
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM"))
print(sorted(model.peft_config["default"].target_modules))
"""


@pytest.mark.parametrize("imports", ["import hf_attn, peft", "import peft, hf_attn"])
def test_a_fresh_process_loads_adapters_whatever_is_imported_first(imports, tmp_path):
    (family, *_) = CAUSAL[0].values
    base, adapter, expected = (str(tmp_path / name) for name in ("base", "adapter", "expected.pt"))
    model = causal_model(family)
    model.save_pretrained(base)
    model = perturbed(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(adapter)
    ids = token_ids(2, 9)
    torch.save({"ids": ids, "logits": logits(model, ids)}, expected)
    run = subprocess.run(
        [sys.executable, "-c", _FRESH.format(imports=imports), base, adapter, expected],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(sorted(model.peft_config["default"].target_modules))


def test_an_adapter_without_a_task_type_loads(tmp_path):
    """Image families have no task type in PEFT: the adapter names the class of its model."""
    set_seed(0)
    base = tiny_model(next(family for family in families() if family.model_type == "shvit"))
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    adapted = perturbed(peft.get_peft_model(model, peft.LoraConfig())).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, adapted(images).logits)
