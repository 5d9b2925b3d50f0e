"""BiFormer: official classifiers and backbones, channels last (legacy) and channels first (nchw), and attention alone."""

import re

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.biformer.modeling_biformer import BiFormerBackbone, BiFormerRoutingAttention
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation, way in (("eager", ""), ("sdpa", "@sdpa")):
        results |= {f"{name}{way}": value for name, value in _run(case, implementation).items()}
    return results


def _run(case: Case, implementation: str) -> dict[str, torch.Tensor]:
    model = from_official("biformer", case.weights, config=case.config)
    if "hidden_states" in case.arrays:
        return _attention(case, model, implementation)
    model.set_attn_implementation(implementation)
    pixel_values = case.input("pixel_values").clone().requires_grad_()
    attention = _noted_attention(case, model)
    routed = []
    handle = attention.router.register_forward_hook(lambda module, inputs, output: routed.extend((*inputs, *output)))
    with recorded({"in": attention}, inputs=True) as inputs, recorded({"out": attention}) as outputs, handle:
        output = model(pixel_values, output_hidden_states=True)
    if isinstance(model, BiFormerBackbone):
        scores = {f"dense_{index}": feature for index, feature in enumerate(output.feature_maps)}
        loss = sum((feature * case.input(f"proj_{i}")).sum() for i, feature in enumerate(output.feature_maps))
    else:
        scores = {"logits": output.logits}
        loss = (output.logits * case.input("proj")).sum()
    loss.backward()
    maps = {"bra_in": inputs["in"], "bra_out": outputs["out"]}
    if model.config.layout == "stl_nchw":
        maps = {name: tensor.permute(0, 3, 1, 2) for name, tensor in maps.items()}
    return {
        **scores,
        "grad_pixel_values": pixel_values.grad,
        "downsample_0": output.hidden_states[0],
        **{f"feature_{index}": feature for index, feature in enumerate(output.hidden_states[1:])},
        **maps,
        **dict(zip(("region_q", "region_k", "routing_weight", "routing_index"), routed, strict=True)),
    }


def _attention(case: Case, attention: torch.nn.Module, implementation: str) -> dict[str, torch.Tensor]:
    """An attention module alone."""
    attention.config._attn_implementation = implementation
    hidden_states = case.input("hidden_states").clone().requires_grad_()
    is_nchw = attention.config.layout == "stl_nchw"
    channels_last = hidden_states.permute(0, 2, 3, 1) if is_nchw else hidden_states
    routed, batch = [], len(hidden_states)
    if isinstance(attention, BiFormerRoutingAttention):
        attention.router.register_forward_hook(lambda module, inputs, output: routed.extend((*inputs, *output)))
    output, weights = attention(channels_last)
    output = output.permute(0, 3, 1, 2) if is_nchw else output
    (output * case.input("proj")).sum().backward()
    results = {"output": output, "grad_hidden_states": hidden_states.grad}
    if routed:
        size = list(channels_last.shape[1:3])
        if attention.config.auto_pad and not is_nchw:
            size = [side + -side % attention.n_win for side in size]
        results["region_size"] = torch.tensor(attention.region_size(*size))
        results |= dict(zip(("region_q", "region_k", "routing_weight", "region_graph"), routed, strict=True))
        results["routing_index"] = results["region_graph"]
    if weights is not None:
        is_routed = weights.shape[0] != batch
        results["attention"] = weights.unflatten(0, (batch, -1)).transpose(1, 2) if is_routed else weights
    return results


def _noted_attention(case: Case, model: torch.nn.Module) -> torch.nn.Module:
    """The routing attention named in the notes of a case, otherwise the first one of the model."""
    stages = getattr(model, "biformer", model).encoder.stages
    noted = re.search(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.attn", case.info["notes"])
    if noted:
        stage, layer = map(int, noted.groups())
        return stages[stage].layers[layer].attention
    return next(module for module in stages.modules() if isinstance(module, BiFormerRoutingAttention))
