"""Deconstructed attention: the maps by themselves, their indicators, and language models of all kinds."""

import re

import torch

from hf_attn.analysis.indicators import attention_indicators, head_diversity
from hf_attn.checkpoints.official import from_official
from hf_attn.mixers.cumulative_softmax import cumulative_softmax, cumulative_softmax_weights, own_scores
from hf_attn.mixers.taylor import JOINT, PER_ORDER, taylor_attention, taylor_weights
from tests.goldens.case import Case


def run(case: Case) -> dict[str, torch.Tensor]:
    return _language_model(case) if "layer_kinds" in case.config else _operators(case)


def _operators(case: Case) -> dict[str, torch.Tensor]:
    query, key, value = (case.input(name) for name in "qkv")
    scale = case.config["head_dim"] ** -0.5
    causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
    scores = own_scores(torch.nn.functional.silu(query), key, scale)
    maps = {
        "standard": (query @ key.transpose(-1, -2) * scale).masked_fill(~causal, -torch.inf).softmax(-1),
        "non_approximate": cumulative_softmax_weights(scores),
        "taylor_joint": taylor_weights(query * scale, key, JOINT)[0],
    }
    results = {}
    for name, attention in maps.items():
        results |= {
            f"attn_{name}": attention,
            f"out_{name}": attention @ value,
            f"ind_{name}": torch.stack(list(attention_indicators(attention).values())),
            f"headdiv_{name}": head_diversity(attention)[None],
        }
    results["out_non_approximate@linear"] = cumulative_softmax(scores[None], value[None], chunk=4)[0][0]
    results["out_taylor_joint@linear"] = taylor_attention(query * scale, key, value, JOINT, chunk=4)[0]
    if case.optional_input("q_abs") is not None:
        query, key = case.input("q_abs"), case.input("k_abs")
        results["out_taylor_per_order_abs"] = sum(taylor_weights(query, key, PER_ORDER)) @ value
        results["out_taylor_per_order_abs@linear"] = taylor_attention(query, key, value, PER_ORDER, chunk=4)[0]
    return results


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    """Each sequence at once with maps, at once without, token by token, and without its simple layers."""
    model = from_official("deconstructing_attention", case.weights, config=case.config)
    names = sorted(name for name in case.arrays if re.fullmatch(r"ids\d+", name))
    results = {}
    for name in names:
        index, input_ids = name.removeprefix("ids"), case.input(name).long()[None]
        with torch.no_grad():
            model.set_attn_implementation("eager")
            output = model(input_ids, output_hidden_states=True, output_attentions=True, use_cache=False)
            results |= {f"logits{index}": output.logits[0], f"hidden{index}": output.hidden_states[-1][0]}
            if index == "0":
                maps = iter(output.attentions)
                results |= {
                    f"attn_layer{layer}": next(maps)[0]
                    for layer, kind in enumerate(model.config.layer_kinds)
                    if kind != "mlp"
                }
            if f"logits_skip{index}" in case.arrays:
                results[f"logits_skip{index}"] = model.without_simple_layers()(input_ids).logits[0]
            if "taylor_per_order" in model.config.layer_kinds:
                # Its denominators come close to 0, where another order of summation causes large differences.
                continue
            model.set_attn_implementation("sdpa")
            results[f"logits{index}@sdpa"] = model(input_ids, use_cache=False).logits[0]
            cache, steps = None, []
            for token in input_ids.split(1, dim=1):
                output = model(token, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                steps.append(output.logits[0])
            results[f"logits{index}@decoded"] = torch.cat(steps)
    # Compare only what the case contains.
    return {way: array for way, array in results.items() if way.split("@")[0] in case.arrays}
