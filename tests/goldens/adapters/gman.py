"""GMAN: the TensorFlow graph, and torch-geometric-temporal's port."""

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.gman.convert_gman import FROM_OFFICIAL
from hf_attn.modeling.gman.layers import set_batch_norm_momentum
from hf_attn.modeling.gman.metrics import forecast_errors

from ..case import Case
from ..tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation in ("eager", "sdpa"):
        network = _port if "torch_geometric_temporal" in case.entry else _official
        results |= {f"{name}@{implementation}": array for name, array in network(case, implementation).items()}
    return results


def _model(case: Case, embedding: str, implementation: str, **config):
    config = {**case.config, **config, "spatial_embedding": case.input(embedding)}
    model = from_official("gman", case.weights, config=config)
    model.set_attn_implementation(implementation)
    return model


def _inputs(model, values: torch.Tensor, time_features: torch.Tensor) -> dict[str, torch.Tensor]:
    past, future = time_features.split([model.config.context_length, model.config.prediction_length], dim=1)
    return {"past_values": values, "past_time_features": past, "future_time_features": future}


def _official(case: Case, implementation: str) -> dict[str, torch.Tensor]:
    # A network for values that are already normalised.
    model = _model(case, "spatial_embedding", implementation, value_mean=0.0, value_std=1.0)
    values = case.input("past_values_normalized").clone().requires_grad_()
    inputs = _inputs(model, values, case.input("time_features"))
    gman = model.gman
    taps = {"inter_ste": gman.embeddings, "inter_encoder0_gate": gman.encoder[0].fusion.gate}
    with recorded(taps) as found:
        outputs = model(**inputs, output_hidden_states=True)
    (outputs.prediction_outputs * case.input("projection")).sum().backward()
    maps = model(**inputs, output_attentions=True)
    found |= {
        "output_normalized": outputs.prediction_outputs,
        "grad_past_values_normalized": values.grad,
        "inter_encoder_out": outputs.hidden_states[model.config.num_hidden_layers],
        "inter_transform_out": outputs.hidden_states[model.config.num_hidden_layers + 1],
        "inter_encoder0_spatial_attn": maps.spatial_attentions[0],
        "inter_encoder0_temporal_attn": maps.temporal_attentions[0],
        "inter_transform_attn": maps.transform_attentions[0],
    }

    # The tolerance is relative to values in real units; close to zero it would be below the rounding of float32.
    real = _model(case, "spatial_embedding", implementation).double()
    config = real.config
    targets = case.input("future_values")
    in_real_units = values.detach().double() * config.value_std + config.value_mean
    outputs = real(**{**inputs, "past_values": in_real_units}, future_values=targets)
    errors = forecast_errors(outputs.prediction_outputs.detach().numpy(), targets.numpy())
    found |= {
        "output": outputs.prediction_outputs,
        "loss": outputs.loss[None],
        "metrics_mae_rmse_mape": torch.tensor([errors[name][-1] for name in ("mae", "rmse", "mape")]),
    }

    model.train()
    model.head.dropout.p = 0.0
    set_batch_norm_momentum(model, 1 - case.config["train_mode_bn_decay"])
    found["train_mode_output_normalized"] = model(**inputs).prediction_outputs
    statistics = {
        f"train_mode_new.{official}": model.state_dict()[ours] for official, ours in _running_statistics(case).items()
    }
    return found | {name: array for name, array in statistics.items() if name in case.arrays}


def _running_statistics(case: Case) -> dict[str, str]:
    return {name: FROM_OFFICIAL(name) for name in case.weights if ".running_" in name}


def _port(case: Case, implementation: str) -> dict[str, torch.Tensor]:
    model = _model(case, "SE", implementation)
    values = case.input("X").clone().requires_grad_()
    block = model.gman.encoder[0]
    taps = {
        "inter_ste": model.gman.embeddings,
        "inter_encoder0_spatial_out": block.spatial_attention,
        "inter_encoder0_temporal_out": block.temporal_attention,
        "inter_transform_out": model.gman.transform_attention,
    }
    with recorded(taps) as found:
        outputs = model(**_inputs(model, values, case.input("TE")))
    (outputs.prediction_outputs * case.input("projection")).sum().backward()
    return found | {"output": outputs.prediction_outputs, "grad_X": values.grad}
