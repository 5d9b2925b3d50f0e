"""BiFormer: the official classifiers, channels last (legacy) and channels first (nchw)."""

import re

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.biformer.modeling_biformer import BiFormerRoutingAttention
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation, way in (("eager", ""), ("sdpa", "@sdpa")):
        results |= {f"{name}{way}": value for name, value in _run(case, implementation).items()}
    return results


def _run(case: Case, implementation: str) -> dict[str, torch.Tensor]:
    model = from_official("biformer", case.weights, config=case.config)
    model.set_attn_implementation(implementation)
    pixel_values = case.input("pixel_values").clone().requires_grad_()
    attention = _noted_attention(case, model)
    routed = []
    handle = attention.router.register_forward_hook(lambda module, inputs, output: routed.extend((*inputs, *output)))
    with recorded({"in": attention}, inputs=True) as inputs, recorded({"out": attention}) as outputs, handle:
        output = model(pixel_values, output_hidden_states=True)
    (output.logits * case.input("proj")).sum().backward()
    maps = {"bra_in": inputs["in"], "bra_out": outputs["out"]}
    if model.config.layout == "stl_nchw":
        maps = {name: tensor.permute(0, 3, 1, 2) for name, tensor in maps.items()}
    return {
        "logits": output.logits,
        "grad_pixel_values": pixel_values.grad,
        "downsample_0": output.hidden_states[0],
        **{f"feature_{index}": feature for index, feature in enumerate(output.hidden_states[1:])},
        **maps,
        **dict(zip(("region_q", "region_k", "routing_weight", "routing_index"), routed, strict=True)),
    }


def _noted_attention(case: Case, model: torch.nn.Module) -> torch.nn.Module:
    """The routing attention that the notes of a case name, else the first of the model."""
    stages = model.biformer.encoder.stages
    noted = re.search(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.attn", case.info["notes"])
    if noted:
        stage, layer = map(int, noted.groups())
        return stages[stage].layers[layer].attention
    return next(module for module in stages.modules() if isinstance(module, BiFormerRoutingAttention))
