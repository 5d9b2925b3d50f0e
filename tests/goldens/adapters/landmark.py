"""Landmark attention: the grouped softmax, a forward pass, inference with memory and generation."""

import re

import torch

from hf_attn.attention.landmark import blocks_of, grouped_softmax, visible_groups
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.landmark.modeling_landmark import LandmarkCache
from tests.goldens.case import Case
from tests.goldens.tools import expected_gradients, parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    if case.config.get("kind") == "op":
        return _grouped_softmax(case)
    if "n_embd" in case.config:
        return _gpt(case)
    return _llama_with_memory(case) if "cache_top_k" in case.config else _llama(case)


def _grouped_softmax(case: Case) -> dict[str, torch.Tensor]:
    scores = case.input("scores").requires_grad_()
    is_landmark = case.input("is_landmark_token").bool()
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = grouped_softmax(scores, is_landmark, causal)
    (weights * case.input("grad_probe")).sum().backward()
    own, gate, inside = visible_groups(is_landmark, causal, blocks_of(is_landmark))
    results = {"probs": weights, "grad_scores": scores.grad}
    masks = {"visible": own | gate | inside, "own_block": own, "gate": gate}
    return results | {name: mask.to(case.arrays[name].dtype) for name, mask in masks.items() if name in case.arrays}


def _llama(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("landmark", case.weights, config=case.config)
    input_ids, probe = case.input("input_ids").long(), case.input("grad_probe")
    padding = case.input("attention_mask").long() if "attention_mask" in case.arrays else None
    results = {}
    for implementation, way in (("eager", ""), ("landmark", "@landmark")):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        with recorded({"hidden_layer1_in": model.model.layers[0]}) as states:
            output = model(
                input_ids, attention_mask=padding, use_cache=False, output_attentions=implementation == "eager"
            )
        (output.logits * probe).sum().backward()
        arrays = {"logits": output.logits, **states}
        if implementation == "eager":
            arrays |= {f"attn_layer{layer}": weights for layer, weights in enumerate(output.attentions)}
        if padding is not None:
            # Queries that are no padding, in row-major order.
            arrays = {
                f"{name}_valid": (array.transpose(1, 2) if name.startswith("attn") else array)[padding.bool()]
                for name, array in arrays.items()
            }
        results |= {f"{name}{way}": array for name, array in arrays.items()}
        gradients = {
            re.sub(r"^model\.layers\.(\d+)\.(self_attn\.|mlp\.)?", r"layer\1.", name): gradient
            for name, gradient in parameter_gradients(model).items()
        }
        for name, gradient in expected_gradients(case, gradients).items():
            results[f"{name}{way}"] = gradient
    return results


def _llama_with_memory(case: Case) -> dict[str, torch.Tensor]:
    """Chunked inference over a prompt with landmarks, and, from the plain prompt, the same with hidden ones and generation."""
    config = case.config
    model = from_official("landmark", case.weights, config={**config, "mem_freq": config["mem_freq_inference"]})
    options = {
        "retrieval": "max_over_tokens" if config["offload_cache_to_cpu"] else "per_token_and_head",
        "max_chunk_length": config["max_chunk_length"] or None,
        "record_retrieved": True,
    }
    cache = LandmarkCache(
        model.config, top_k=config["cache_top_k"], offload_to_cpu=config["offload_cache_to_cpu"], **options
    )
    prompt = case.input("prompt_ids").long()
    with torch.no_grad():
        results = {"chunk_logits": model(case.input("prompt_with_landmarks").long(), past_key_values=cache).logits}
    for name in case.expected:
        if match := re.fullmatch(r"picked_blocks_chunk(\d+)_layer(\d+)", name):
            chunk, layer = map(int, match.groups())
            # The first chunk retrieves nothing.
            results[name] = cache.retrieved_blocks[layer][chunk - 1].expand(case.arrays[name].shape)
    steps = case.arrays["generated_ids"].shape[1]
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        cache_top_k=config["cache_top_k"],
        offload_cache_to_cpu=config["offload_cache_to_cpu"],
        **options,
    )
    return results | {
        "generated_ids": generated.sequences[:, prompt.shape[1] :],
        "step_logits": torch.stack(generated.logits, dim=1),
    }


def _gpt(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("landmark", case.weights, config=case.config)
    config, input_ids = case.config, case.input("input_ids").long()
    cache = LandmarkCache(
        model.config,
        top_k=config["cache_topk"],
        retrieval=config["cache_selection_method"],
        max_blocks=config["mem_cache_size"],
    )
    cache.max_chunk_length = None
    with torch.no_grad():
        chunks = input_ids.split(config["mid_length"], dim=1)
        logits = [model(chunk, past_key_values=cache, insert_landmarks=True).logits for chunk in chunks]
        window = model(case.input("window_ids").long(), use_cache=False).logits
    return {"cached_logits": torch.cat(logits, dim=1), "window_logits": window}
