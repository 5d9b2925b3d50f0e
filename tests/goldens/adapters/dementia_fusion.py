"""Dementia fusion: attention layers, the head, transport, features and calibration."""

import torch

from hf_attn.analysis.calibration import (
    ClassificationMetrics,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
)
from hf_attn.architectures.transport import entropic_plan, exact_plan, squared_distances, transported
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.dementia_fusion.features import decibels, deltas, mel_power

from ..case import Case
from ..tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    if case.weights:
        return _head(case) if "classifier.weight" in case.weights else _attention(case)
    for word, function in _ENTRIES.items():
        if word in case.entry:
            return function(case)
    raise LookupError(f"No entry {case.entry!r}.")


#: arguments that cannot be inferred from the weights
_ARGUMENTS = ("num_heads", "context", "cross", "ot_reg", "ot_iters", "label_smoothing")


def _official(case: Case) -> torch.nn.Module:
    config = {name: case.config[name] for name in _ARGUMENTS if name in case.config}
    if any("gate_out" in name for name in case.weights):
        config.pop("context", None)
    return from_official("dementia_fusion", case.weights, config=config)


def _attention(case: Case) -> dict[str, torch.Tensor]:
    layer = _official(case)
    states, valid = case.input("states"), case.optional_input("valid")
    states = (states if states.ndim == 3 else states[None]).requires_grad_()
    taps = {"lambda_query": "query_gate", "lambda_key": "key_gate", "gate": "gate"}
    modules = dict(layer.named_children())
    taps = {name: modules[module] for name, module in taps.items() if module in modules}
    found = {}
    for implementation in ("eager", "sdpa"):
        layer.config._attn_implementation = implementation
        with recorded(taps) as seen:
            output, _ = layer([layer_states[None] for layer_states in states], None if valid is None else valid[None])
        seen = {name: array[0] for name, array in seen.items()} | {"output": output[0]}
        if "gate" in seen:
            seen |= dict.fromkeys(("gates", "mask", "M"), seen["gate"])
        projection = case.optional_input("projection")
        if projection is not None:
            gradient = torch.autograd.grad((output[0] * projection).sum(), states)[0]
            seen["grad_states"] = gradient.view_as(case.input("states"))
        found |= {f"{name}@{implementation}": array for name, array in seen.items()}
    return found


def _head(case: Case) -> dict[str, torch.Tensor]:
    head = _official(case)
    mask = case.optional_input("text_mask")
    states = [case.input(name).unbind(1) for name in ("text_states", "image_states")]
    found = {}
    for implementation in ("eager", "sdpa"):
        head.config._attn_implementation = implementation
        output = head(*states, mask, case.input("labels"))
        interaction = output.interaction
        arrays = {"logits": output.logits, "loss": output.loss[None], "streams": interaction.streams}
        if output.fusion_weights is not None:
            arrays["fusion_weights"] = output.fusion_weights
        for index in range(len(output.logits) if interaction.text_to_image_plan is not None else 0):
            real = slice(None) if mask is None else mask[index].bool()
            arrays[f"coupling_{index}"] = interaction.text_to_image_plan[index][real]
        found |= {f"{name}@{implementation}": array for name, array in arrays.items()}
    return found


def _transport(case: Case) -> dict[str, torch.Tensor]:
    source, target = (case.input(name)[None].double() for name in ("source", "target"))
    cost = squared_distances(source, target, normalize=case.config.get("norm") == "max")
    # The cases were iterated to convergence.
    plans = {"sinkhorn": entropic_plan(cost, case.config.get("reg_e", 0.1), 20000)}
    plans |= {f"emd@{solver}": exact_plan(cost, solver=solver) for solver in ("pot", "scipy")}
    found = {"cost": cost[0]}
    for name, plan in plans.items():
        method, _, way = name.partition("@")
        way = way and f"@{way}"
        found |= {
            f"{method}_coupling{way}": plan[0],
            f"{method}_transported{way}": transported(plan, target)[0],
            f"{method}_cost{way}": (plan * cost).sum((1, 2)),
        }
    return found


#: librosa's argument -> ours
_MEL_ARGUMENTS = {
    "n_mels": "num_mel_filters",
    "n_fft": "n_fft",
    "hop_length": "hop_length",
    "window": "window",
    "center": "center",
    "pad_mode": "pad_mode",
    "power": "power",
    "fmin": "min_frequency",
    "fmax": "max_frequency",
    "mel_scale": "mel_scale",
    "norm": "norm",
}


def _features(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    arguments = {ours: config[theirs] for theirs, ours in _MEL_ARGUMENTS.items() if theirs in config}
    power = mel_power(case.input("waveform").numpy(), config["sampling_rate"], **arguments)
    levels = decibels(power, config.get("amin", 1e-10), config.get("top_db", 80.0))
    channels = deltas(levels, config.get("delta_width", 9), config.get("delta_mode", "interp"))
    return {"mel_power": torch.from_numpy(power), "channels": torch.from_numpy(channels)}


def _metrics(case: Case) -> dict[str, torch.Tensor]:
    probabilities, labels = (case.input(name).numpy() for name in ("probabilities", "labels"))
    metrics = ClassificationMetrics().compute(probabilities, labels) | {
        "ece": expected_calibration_error(probabilities, labels, case.config.get("bins", 10)),
        "ace": adaptive_calibration_error(probabilities, labels, case.config.get("ranges", 10)),
        "brier": brier_score(probabilities, labels),
    }
    return {name: torch.tensor([value]) for name, value in metrics.items()}


_ENTRIES = {
    "ot.da": _transport,
    "librosa": _features,
    "metrics": _metrics,
}
