"""ComplexFormer: one attention module with and without a cache, and the language model."""

import torch
from transformers import DynamicCache

from hf_attn.architectures.decoder import CACHE
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.complexformer.convert_complexformer import OUR_NAMES
from hf_attn.modeling.complexformer.modeling_complexformer import make_rotary_embedding, position_angles
from tests.goldens.case import Case
from tests.goldens.tools import parameter_gradients


def run(case: Case) -> dict[str, torch.Tensor]:
    return {"attention": _attention, "lm": _language_model}[case.config["level"]](case)


def _attention(case: Case) -> dict[str, torch.Tensor]:
    module = from_official("complexformer", case.weights, config=case.config)
    x = case.input("x").requires_grad_()
    length = x.shape[1]
    rotary = make_rotary_embedding(module.config)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, length, length).masked_fill(~causal, torch.finfo(torch.float32).min)
    positions = position_angles(rotary, x, torch.arange(length)[None])

    module.config._attn_implementation = "eager"
    cache = DynamicCache()
    y, attn = module(x, position_embeddings=positions, attention_mask=mask, **{CACHE: cache})
    queries, keys = module.queries_and_keys(x, positions)
    scores = (queries @ keys.transpose(-1, -2) * module.scaling).masked_fill(~causal, 0.0)
    results = {"y": y, "attn": attn, "scores": scores}
    if "grad_probe" in case.arrays:
        (y * case.input("grad_probe")).sum().backward()
        gradients = {OUR_NAMES(name): gradient for name, gradient in parameter_gradients(module).items()}
        results |= {
            "grad_x": x.grad,
            "grad_delta": gradients["delta_params"],
            "grad_bias": gradients["bias_params"],
            **{f"grad_W_{p}": gradients[f"{p}_proj.weight"] for p in "qkvo"},
        }
    if "decode_x" in case.arrays:
        steps = []
        for i, step in enumerate(case.input("decode_x").split(1, dim=1)):
            position = position_angles(rotary, step, torch.tensor([[length + i]]))
            steps.append(module(step, position_embeddings=position, **{CACHE: cache})[0])
        results["decode_y"] = torch.cat(steps, dim=1)
    module.config._attn_implementation = "sdpa"
    results["y@sdpa"] = module(x, position_embeddings=positions, attention_mask=mask)[0]
    return {name: value for name, value in results.items() if name.partition("@")[0] in case.expected}


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("complexformer", case.weights, config=case.config)
    input_ids = case.input("input_ids").long()
    mask = case.optional_input("attention_mask")
    results = {}
    for implementation, way in (("eager", ""), ("sdpa", "@sdpa")):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(input_ids, attention_mask=mask).logits
        results[f"logits{way}"] = logits
        if "grad_probe" in case.arrays:
            (logits * case.input("grad_probe")).sum().backward()
            gradients = parameter_gradients(model)
            found = {"grad_embed_tokens": gradients["model.embed_tokens.weight"]}
            for i in range(model.config.num_hidden_layers):
                for kind in ("delta", "bias"):
                    found[f"grad_{kind}_{i}"] = gradients[f"model.layers.{i}.self_attn.{kind}_params"]
            results |= {f"{name}{way}": value for name, value in found.items() if name in case.expected}
    return results
