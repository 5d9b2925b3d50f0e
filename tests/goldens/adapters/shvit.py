"""SHViT: whole models, plain and fused."""

import re

import torch
from torch import nn

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.shvit.convert_shvit import OUR_NAMES
from hf_attn.modeling.shvit.modeling_shvit import SHViTAttention
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation in ("eager", "sdpa"):
        model = from_official("shvit", case.weights, config=case.config)
        model.set_attn_implementation(implementation)
        base = getattr(model, "shvit", model)
        way = f"@{implementation}"
        pixel_values = case.input("pixel_values").clone().requires_grad_()
        with (
            recorded({f"stem{way}": base.embeddings, f"shsa_out{way}": _attention(model, case)}) as outputs,
            recorded({f"shsa_in{way}": _attention(model, case)}, inputs=True) as inputs,
        ):
            output = model(pixel_values, output_hidden_states=True)
        (_scores(output) * case.input("proj")).sum().backward()
        features = {f"feature_{i}{way}": feature for i, feature in enumerate(output.hidden_states[1:])}
        if output.get("distillation_logits") is not None:
            results[f"logits_cls{way}"] = output.class_logits
            results[f"logits_dist{way}"] = output.distillation_logits
        results |= {f"logits{way}": _scores(output), f"grad_pixel_values{way}": pixel_values.grad}
        results |= outputs | inputs | features

        state = model.fuse().state_dict()
        results[f"logits_fused{way}"] = _scores(model(pixel_values))
        for name in case.expected:
            if name.startswith("fused."):
                results[f"{name}{way}"] = state[_fused_name(name.removeprefix("fused."), state)]
    return results


def _scores(output) -> torch.Tensor:
    """The logits, or the pooled output of a model without a classifier."""
    return output.logits if "logits" in output else output.pooler_output


def _attention(model: nn.Module, case: Case) -> nn.Module:
    """The attention module named in the notes of a case; by default the first one."""
    named = re.search(r"shsa is ([\w.]+\w)", case.info.get("notes", ""))
    if named:
        name = OUR_NAMES(f"{named[1]}.").removesuffix(".")
        return model.get_submodule(name if hasattr(model, "shvit") else name.removeprefix("shvit."))
    return next(module for module in model.modules() if isinstance(module, SHViTAttention))


def _fused_name(official: str, state: dict[str, torch.Tensor]) -> str:
    """Our name of a tensor that the official code names after folding: a convolution or linear layer in place of a pair."""
    module, kind = official.rsplit(".", 1)
    candidates = [OUR_NAMES(f"{module}.{layer}.{kind}") for layer in ("c", "m.c", "l")] + [OUR_NAMES(official)]
    candidates += [name.removeprefix("shvit.") for name in candidates]
    return next(name for name in candidates if name in state)
