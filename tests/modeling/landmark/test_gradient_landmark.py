"""The gradient of the embeddings in the golden case whose tolerance float32 does not reach (tests/goldens/test_goldens.py)."""

from pathlib import Path

import pytest
import torch

from hf_attn.checkpoints.official import from_official
from tests.goldens import test_goldens
from tests.goldens.case import Case


@pytest.mark.parametrize("implementation", ["eager", "landmark"])
def test_the_gradient_is_as_exact_as_the_official_one(implementation):
    """Against float64: the official float32 gradient is off by 0.0031 in its norm and 7e-4 in an entry, ours by 0.0026 and
    6e-4. Processors round differently, hence the half more."""
    case = Case(Path(test_goldens.__file__).parent / "landmark" / "llama_full_forward")
    ids, probe = case.input("input_ids").long(), case.input("grad_probe")

    def gradient(dtype: torch.dtype, name: str) -> torch.Tensor:
        model = from_official("landmark", case.weights, config=case.config).to(dtype)
        model.set_attn_implementation(name)
        (model(ids, use_cache=False).logits * probe.to(dtype)).sum().backward()
        return model.get_input_embeddings().weight.grad.double()

    exact = gradient(torch.float64, "eager")
    official = case.arrays["grad_embed_tokens"].double() - exact
    ours = gradient(torch.float32, implementation) - exact
    assert ours.norm() <= 1.5 * official.norm()
    assert ours.abs().max() <= 1.5 * official.abs().max()
    assert official.norm() < 1e-4 * exact.norm()
