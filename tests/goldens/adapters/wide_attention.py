"""Wide attention: classifiers of texts and of pairs of texts, in every implementation of attention."""

import torch

from hf_attn.checkpoints.official import from_official
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation in ("eager", "sdpa"):
        model = from_official("wide_attention", case.weights, config=case.config)
        model.set_attn_implementation(implementation)
        found = _matching(case, model) if "head.fc3.weight" in case.weights else _classifier(case, model)
        results |= {f"{name}@{implementation}": array for name, array in found.items()}
    return results


def _inputs(case: Case, prefix: str) -> list[torch.Tensor]:
    names = sorted(name for name in case.info["inputs"] if name.startswith(prefix))
    return [case.input(name) for name in names]


def _classifier(case: Case, model) -> dict[str, torch.Tensor]:
    input_ids = case.input("input_ids").long()
    mask = case.optional_input("attention_mask")
    valid = (input_ids != 0) if mask is None else mask.bool()
    taps = {f"attn{index}_heads": layer.self_attn.o_proj for index, layer in enumerate(model.model.layers)}
    with recorded({"last_hidden": model.model.norm}) as found, recorded(taps, inputs=True) as heads:
        logits = model(input_ids, attention_mask=mask).logits
    if model.config.pooling == "cls":
        valid = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
    return {"logits": logits, **{f"{name}_valid": states[valid] for name, states in (found | heads).items()}}


def _matching(case: Case, model) -> dict[str, torch.Tensor]:
    """Arrays of hidden states contain those of the first texts, followed by those of the second ones."""
    first, second = (ids.long() for ids in _inputs(case, "input_ids"))
    masks = _inputs(case, "attention_mask") or [None, None]
    masks = dict(zip(("attention_mask", "other_attention_mask"), masks, strict=True))
    states = {"features": model.classifier.layers[0]}
    with recorded({"last_hidden": model.model.norm}) as found, recorded(states, inputs=True) as pooled:
        logits = model(first, other_input_ids=second, **masks).logits
    hidden = [
        part[:, : ids.shape[1]][ids != 0]
        for part, ids in zip(found["last_hidden"].chunk(2), (first, second), strict=True)
    ]
    return {"logits": logits, **pooled, "last_hidden_valid": torch.cat(hidden)}
