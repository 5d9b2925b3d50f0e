"""Activator, with and without the MLP."""

import torch

from hf_attn.checkpoints.official import from_official
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("activator", case.weights, config=case.config)
    pixel_values = case.input("pixel_values").requires_grad_()
    modules = {}
    for index, layer in enumerate(model.activator.layers):
        modules[f"block{index}_gating_unit"] = layer.gating_unit
        modules[f"block{index}_proj_1"] = layer.gating_unit.proj_1
        modules[f"block{index}_proj_2"] = layer.gating_unit.proj_2
    with recorded(modules) as taps:
        output = model(pixel_values, output_hidden_states=True)
    (output.logits * case.input("projection")).sum().backward()
    return {
        "logits": output.logits,
        "grad_pixel_values": pixel_values.grad,
        **{f"block{index}": hidden_states for index, hidden_states in enumerate(output.hidden_states[1:])},
        **taps,
    }
