"""Sigmoid attention: attention functions, the simulator's models and AXLearn's."""

import torch

from hf_attn.architectures.rotary import interleaved
from hf_attn.attention import Refusal
from hf_attn.attention.sigmoid import SIGMOID, SigmoidCall, sigmoid_weights
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.sigmoid_attention.convert_sigmoid_attention import to_official
from tests.goldens.case import Case
from tests.goldens.tools import expected_gradients, parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    entries = {
        "layers/activations.py": _activations,
        "attention_ref": _attention,
        "CrossAttention": _cross_attention,
        "RoPECrossAttention (CrossAttention with qk_transform=apply_rotary_emb)": _cross_attention,
        "CausalBlockContainer": _language_model,
        "causal_lm.Model(extract_logits)": _language_model,
    }
    return entries[case.entry](case)


def _activations(case: Case) -> dict[str, torch.Tensor]:
    logits = case.input("logits")
    return {
        "sigmoid": sigmoid_weights(logits),
        "seq_len_normalized_sigmoid": sigmoid_weights(logits, normalization="row"),
        "sqrt_seq_len_normalized_sigmoid": sigmoid_weights(logits, normalization="sqrt_row"),
    }


# --- the function, in every implementation ---------------------------------------------------------------------------


def _attention(case: Case) -> dict[str, torch.Tensor]:
    """Tensors of the case are (batch, length, heads, dim); a window (left, right) has -1 for no limit."""
    config = case.config
    unknown = set(config) - {"B", "Tq", "Tk", "H", "Hkv", "D", "causal", "window", "alibi", "sigmoid_bias"}
    if unknown:
        raise ValueError(f"Options of the case that the adapter does not know: {sorted(unknown)}.")
    query, key, value = (case.input(name).transpose(1, 2) for name in "qkv")
    upstream = case.input("dout")
    mask, window = _mask(config, query.shape[2], key.shape[2], case.optional_input("key_mask"))
    slopes = case.optional_input("alibi_slopes")
    arguments = {
        "scaling": query.shape[-1] ** -0.5,
        "bias": config["sigmoid_bias"],
        "attention_mask": mask,
        "is_causal": config["causal"],
        "sliding_window": window,
        "alibi_slopes": slopes if config["alibi"] else None,
        "query_offset": key.shape[2] - query.shape[2],
    }
    results = {}
    for implementation in SIGMOID.implementations:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        call = SigmoidCall(*leaves, **arguments, output_weights=implementation.name == "eager")
        found = implementation.check(call)
        if isinstance(found, Refusal):
            continue
        output, weights = implementation.compute(call, found)
        output = output.transpose(1, 2)
        gradients = torch.autograd.grad(output, leaves, upstream)
        way = f"@{implementation.name}"
        results[f"out{way}"] = output
        results |= {f"d{name}{way}": gradient.transpose(1, 2) for name, gradient in zip("qkv", gradients, strict=True)}
        if weights is not None:
            results[f"attn{way}"] = weights
    return results


def _mask(
    config: dict, q_len: int, kv_len: int, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, int | None]:
    """Mask and symmetric window for a window in the form of FlashAttention's."""
    left, right = config["window"]
    right = 0 if config["causal"] else right
    mask = None if key_mask is None else key_mask[:, None, None, :].bool()
    if left < 0 and (right < 0 or config["causal"]):
        return mask, None
    if left >= 0 and (left == right or config["causal"]):
        return mask, left + 1
    ahead = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (kv_len - q_len)
    allowed = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left >= 0:
        allowed &= ahead >= -left
    if right >= 0:
        allowed &= ahead <= right
    return (allowed if mask is None else mask & allowed), None


# --- models -------------------------------------------------------------------------------------------------------


def _cross_attention(case: Case) -> dict[str, torch.Tensor]:
    # The official classes differ only in their positions, for which they have no argument.
    position = "rope" if case.entry.startswith("RoPE") else None
    model = from_official("sigmoid_attention", case.weights, config={**case.config, "position": position})
    query, key_value = (case.input(name).requires_grad_() for name in ("q", "kv"))
    output, weights = model(query, key_value, key_mask=case.optional_input("key_mask"))
    (output * case.input("proj")).sum().backward()
    official = parameter_gradients(model) | {"q": query.grad, "kv": key_value.grad}
    for kind in ("weight", "bias"):
        if f"o_proj.{kind}" in official:
            official[f"proj.{kind}"] = official.pop(f"o_proj.{kind}")
            official[f"kv_proj.{kind}"] = torch.cat([official.pop(f"{part}_proj.{kind}") for part in "kv"])
    if position == "rope":
        names = [name for name in official if name.startswith(("q_proj", "q_norm", "k_norm"))]
        official |= {name: interleaved(official[name], model.head_dim) for name in names}
        for kind in ("weight", "bias"):
            if f"kv_proj.{kind}" in official:
                key, value = official[f"kv_proj.{kind}"].chunk(2)
                official[f"kv_proj.{kind}"] = torch.cat([interleaved(key, model.head_dim), value])
    return {"y": output, "attn_matrix": weights, **expected_gradients(case, official)}


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    """A model of either code base: once with everything recorded, once through the fastest implementation."""
    model = from_official("sigmoid_attention", case.weights, config=case.config)
    input_ids, attention_mask = case.input("input_ids").long(), case.optional_input("attention_mask")
    layers = model.model.layers
    results = {}
    for implementation, way in (("eager", ""), ("sigmoid", "@sigmoid")):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        blocks = {f"block{i}_output{way}": layer for i, layer in enumerate(layers)}
        merged = {f"block{i}_attn_times_v{way}": layer.self_attn.o_proj for i, layer in enumerate(layers)}
        norm = {f"hidden_states{way}": model.model.norm}
        with recorded(blocks | norm) as outputs, recorded(merged, inputs=True) as inputs:
            output = model(
                input_ids,
                attention_mask=attention_mask,
                # Positions count from the first token of a row, including padding.
                position_ids=torch.arange(input_ids.shape[1])[None],
                output_attentions=implementation == "eager",
            )
        (output.logits * case.input("proj")).sum().backward()
        results |= {f"logits{way}": output.logits, **outputs, **inputs}
        if implementation == "eager":
            results |= {f"block{i}_attn_matrix": weights for i, weights in enumerate(output.attentions)}
        gradients = to_official(parameter_gradients(model), model.config)
        results |= {f"{name}{way}": gradient for name, gradient in expected_gradients(case, gradients).items()}
    return results
