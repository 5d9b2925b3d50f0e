"""Path ensemble: independent reference on ViTs of transformers and timm."""

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.path_ensemble.modeling_path_ensemble import path_distance, path_divergence
from tests.goldens.case import Case


def _model(case: Case, **fields):
    return from_official("path_ensemble", case.weights, config={**case.config, **fields})


def run(case: Case) -> dict[str, torch.Tensor]:
    pixel_values = case.input("pixel_values")
    model = _model(case)
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        outputs = model.vit(pixel_values, output_paths=True)
        each = model.path_logits(pixel_values)
        dropped = []
        for count in range(1, layers + 1):
            model.prune(range(count))
            dropped.append(model(pixel_values).logits)
    with torch.no_grad():
        branches = _model(case, granularity="branch").vit(pixel_values, output_paths=True).paths
    temperature = model.config.distillation_temperature
    return {
        "baseline_logits": each.ensemble,
        "logits_full": each.ensemble,
        "final_hidden": outputs.ensemble,
        "paths_layer": torch.stack(outputs.paths),
        "paths_branch": torch.stack(branches),
        "logits_drop_first": torch.stack(dropped),
        "logits_leave_one_out": each.without,
        "logits_single_path": each.alone,
        "kl_to_longest": path_divergence(each.alone[:-1], each.alone[-1], temperature),
        "mse_to_longest": path_distance(outputs.paths[:-1], outputs.paths[-1]),
        **(_scaled(case, pixel_values) if "ensemble_scale" in case.arrays else {}),
        **(_scaled_branches(case, pixel_values) if "ensemble_scale_branch" in case.arrays else {}),
    }


def _scaled(case: Case, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    model = _model(case, ensemble_scale="channel")
    model.vit.ensemble_scale.data.copy_(case.input("ensemble_scale"))
    logits = model(pixel_values).logits
    (logits * case.input("projection")).sum().backward()
    results = {"logits_scaled": logits, "grad_ensemble_scale": model.vit.ensemble_scale.grad}
    model.prune([0])
    return results | {"logits_scaled_drop_first1": model(pixel_values).logits}


def _scaled_branches(case: Case, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    model = _model(case, ensemble_scale="channel", granularity="branch")
    model.vit.ensemble_scale.data.copy_(case.input("ensemble_scale_branch"))
    return {"logits_scaled_branch": model(pixel_values).logits}
