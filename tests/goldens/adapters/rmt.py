"""RMT: whole models, dense or with a classifier, and the attention module in both forms."""

import re

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.rmt.modeling_rmt import RMTBackbone, RMTRelativePositions
from hf_attn.modeling.rmt.token_labeling import token_labeling_loss
from tests.goldens.case import Case


def run(case: Case) -> dict[str, torch.Tensor]:
    if "target" in case.arrays:
        return _token_labeling(case)
    return _model(case) if "pixel_values" in case.arrays else _attention(case)


def _token_labeling(case: Case) -> dict[str, torch.Tensor]:
    """The losses, each with the gradients of both kinds of scores."""
    weights = {"class_weight": case.config["cls_weight"], "token_weight": case.config["dense_weight"]}
    box = tuple(case.input("bbox").tolist())
    forms = {
        "plain": (case.input("target"), {"box": box}),
        "gt": (case.input("target"), {"box": box, "with_ground_truth": True}),
        "flat": (case.input("target_flat"), {}),
    }
    results = {}
    for form, (targets, options) in forms.items():
        scores = [case.input(name).clone().requires_grad_() for name in ("logits_cls", "logits_aux")]
        loss = token_labeling_loss(*scores, targets, **options, **weights)
        loss.backward()
        results[f"loss_{form}"] = loss
        results |= {f"grad_{name}_{form}": array.grad for name, array in zip(("cls", "aux"), scores, strict=True)}
    return results


def _attention(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    attention = from_official("rmt", case.weights, config=config)
    results = {}
    for implementation in ("eager", "sdpa"):
        attention.config._attn_implementation = implementation
        for form in ("full", "axis"):
            positions = RMTRelativePositions(
                attention.head_dim,
                config["num_heads"],
                config["initial_value"],
                config["heads_range"],
                axis_decomposed=form == "axis",
            )
            hidden_states = case.input("hidden_states").clone().requires_grad_()
            tables = positions(hidden_states)
            output, _ = attention(hidden_states, tables)
            (output * case.input("proj")).sum().backward()
            results[f"output_{form}@{implementation}"] = output
            results[f"grad_{form}@{implementation}"] = hidden_states.grad
            results |= {"sin": tables.sin, "cos": tables.cos}
            if form == "full":
                results["mask_2d"] = tables.masks[0]
            else:
                results["mask_w"], results["mask_h"] = tables.masks
    return results


def _model(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("rmt", case.weights, config=case.config)
    stages = getattr(model, "rmt", model).encoder.stages
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        way = f"@{implementation}"
        pixel_values = case.input("pixel_values").clone().requires_grad_()
        output = model(pixel_values, output_hidden_states=True)
        stem, *features = output.hidden_states
        found = {"stem": stem.permute(0, 2, 3, 1)}
        channels_last = {f"feature_{index}": feature.permute(0, 2, 3, 1) for index, feature in enumerate(features)}
        if isinstance(model, RMTBackbone):
            # Cases either call the outputs of the backbone dense_i, or contain nothing else.
            has_both = any(name.startswith("dense_") for name in case.arrays)
            found |= channels_last if has_both else {}
            prefix = "dense" if has_both else "feature"
            found |= {f"{prefix}_{index}": feature for index, feature in enumerate(output.feature_maps)}
            loss = sum(
                (feature * case.input(name)).sum()
                for index, feature in enumerate(output.feature_maps)
                if (name := f"proj_{index}") in case.arrays
            )
        else:
            found |= channels_last | {"logits": output.logits}
            if output.token_logits is not None:
                found |= {"logits_cls": output.class_logits, "logits_aux": output.token_logits}
            loss = (output.logits * case.input("proj")).sum()
        if "grad_pixel_values" in case.arrays:
            loss.backward()
            found["grad_pixel_values"] = pixel_values.grad
        results |= {f"{name}{way}": array for name, array in found.items()}
    for name in case.expected:
        table = re.fullmatch(r"(mask_h|mask_w|mask_2d|sin|cos)_(\d+|last)", name)
        if table:
            stage = len(stages) - 1 if table[2] == "last" else int(table[2])
            height, width = features[stage].shape[2:]
            positions = stages[stage].relative_positions
            tables = positions(features[stage].permute(0, 2, 3, 1))
            results[name] = {
                "mask_h": lambda p=positions, h=height: p.axis_mask(h),
                "mask_w": lambda p=positions, w=width: p.axis_mask(w),
                "mask_2d": lambda p=positions, h=height, w=width: p.full_mask(h, w),
                "sin": lambda t=tables: t.sin,
                "cos": lambda t=tables: t.cos,
            }[table[1]]()
    return results
