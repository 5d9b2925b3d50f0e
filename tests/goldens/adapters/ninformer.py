"""NiNformer."""

import torch

from hf_attn.checkpoints.official import from_official
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("ninformer", case.weights, config=case.config)
    pixel_values = case.input("pixel_values").requires_grad_()
    layers = model.ninformer.layers
    units = {f"block{index}_gating_unit": layer.gating_unit for index, layer in enumerate(layers)}
    values = {f"block{index}_value": layer.gating_unit.proj for index, layer in enumerate(layers)}
    with recorded(units | values) as taps:
        output = model(pixel_values, output_hidden_states=True, output_gates=True)
    (output.logits * case.input("projection")).sum().backward()
    return {
        "logits": output.logits,
        "grad_pixel_values": pixel_values.grad,
        **{f"block{index}": hidden_states for index, hidden_states in enumerate(output.hidden_states[1:])},
        **{f"block{index}_gate": gate for index, gate in enumerate(output.gates)},
        **taps,
    }
