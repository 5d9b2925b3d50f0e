"""Random-feature attention: features, ridge fits, targets, and the kernel of infinitely many heads."""

import torch

from hf_attn import from_official
from hf_attn.modeling.random_feature_attention.kernels import infinite_head_kernel
from hf_attn.modeling.random_feature_attention.targets import target_function

from ..case import Case


def _kernel(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    return {"kernel": infinite_head_kernel(case.input("x"), biased=config["biased"], weight_std=config["weight_std"])}


def _ridge(case: Case) -> dict[str, torch.Tensor]:
    x_train, y_train = case.input("x_train"), case.input("y_train")
    x_test = case.input("x_test").clone().requires_grad_()
    penalty = case.config["ridge_lambda"]

    def load(*names: str):
        weights = {name: case.weights[name] for name in names if name in case.weights}
        return from_official("random_feature_attention", weights, config=case.config)

    attention = load("qk_weight", "value_weight")
    predicted = attention(x_test).logits
    predicted.sum().backward()
    found = {
        "features_train": attention.features(x_train),
        "pred_test": predicted,
        "grad_pred_wrt_x_test": x_test.grad,
        "target_test": target_function(x_test, case.input("beta"), **case.config["target"]),
    }
    for solver in ("primal", "dual"):
        found[f"pred_test@{solver}"] = attention.fit_ridge(x_train, y_train, penalty, solver)(x_test).logits
    network = load("mlp_weight", "mlp_value")
    found["mlp_pred_test"] = network.fit_ridge(x_train, y_train, penalty)(x_test).logits
    return found


def run(case: Case) -> dict[str, torch.Tensor]:
    return _kernel(case) if "kernel" in case.expected else _ridge(case)
