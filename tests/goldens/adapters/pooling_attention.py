"""Pooling and attention: the head alone, and the five designs with their losses."""

import torch

from hf_attn.checkpoints.official import from_official
from hf_attn.training.contrastive import contrastive_loss
from tests.goldens.case import Case
from tests.goldens.tools import expected_gradients, parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    return _designs(case) if "llm" in case.config else _head(case)


#: our name of a parameter -> official name, for gradients that cases list by official key
_OFFICIAL = {
    "latents": "latents",
    "layer_embeddings": "pos_emb.weight",
    "attention.states_norm": "cross_attend_blocks.0.norm",
    "attention.latents_norm": "cross_attend_blocks.0.norm_context",
    "attention.query": "cross_attend_blocks.0.fn.to_q",
    "attention.dense": "cross_attend_blocks.0.fn.to_out",
    "feed_forward.norm": "cross_attend_blocks.1.norm",
    "feed_forward.expand": "cross_attend_blocks.1.fn.net.0",
    "feed_forward.contract": "cross_attend_blocks.1.fn.net.2",
}


def _official_gradients(head: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = parameter_gradients(head)
    official = {
        "cross_attend_blocks.0.fn.to_kv.weight": torch.cat(
            [own.pop(f"attention.{part}.weight") for part in ("key", "value")]
        )
    }
    for name, gradient in own.items():
        module, _, parameter = name.rpartition(".")
        official[_OFFICIAL[name] if name in _OFFICIAL else f"{_OFFICIAL[module]}.{parameter}"] = gradient
    return official


def _head(case: Case) -> dict[str, torch.Tensor]:
    head = from_official("pooling_attention", case.weights, config=case.config)
    projection, results = case.input("projection"), {}
    mask = next((case.input(name) for name in case.info["inputs"] if "mask" in name and name in case.arrays), None)
    for way, forward in {"eager": head.eager_forward, "fast": head.forward}.items():
        head.zero_grad()
        hiddens = case.input("hiddens").clone().requires_grad_()
        with recorded({"feed_forward": head.feed_forward}) as seen:
            pooled = forward(hiddens, None if mask is None else mask.bool())
        embedding = torch.nn.functional.normalize(pooled, dim=-1)
        (embedding * projection).sum().backward()
        states = head._add_layer_embeddings(case.input("hiddens"))
        attend = head.attention.eager_forward if way == "eager" else head.attention
        attended = attend(head.latents, states, None if mask is None else mask.bool())
        found = {
            "embedding": embedding,
            "cross_attention": attended.expand(-1, len(head.latents), -1),
            "grad_hiddens": hiddens.grad,
            **seen,
            **_gradients(case, head),
        }
        results |= {f"{name}@{way}": array for name, array in found.items() if name in case.expected}
    return results


def _gradients(case: Case, head: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The expected gradients of parameters."""
    found = expected_gradients(case, _official_gradients(head) | {"hiddens": head.latents})
    found.pop("grad_hiddens", None)
    return found


def _designs(case: Case) -> dict[str, torch.Tensor]:
    batches = ("query", "positive", "negative")
    batches = [name for name in batches if f"{name}_ids" in case.arrays]
    inputs = {
        name: {"input_ids": case.input(f"{name}_ids"), "attention_mask": case.input(f"{name}_mask")}
        for name in batches
    }
    valid = inputs["query"]["attention_mask"].bool()
    results = {}
    designs = sorted({int(name[6]) for name in case.arrays if name.startswith("design")})
    for design in designs:
        model = from_official("pooling_attention", case.weights, config={**case.config, "design": design})
        for way in ("eager", "sdpa"):
            model.set_attn_implementation(way)
            embeddings = {name: model(**batch).pooler_output for name, batch in inputs.items()}
            found = {f"design{design}_{name}": embedding for name, embedding in embeddings.items()}
            loss = contrastive_loss(*embeddings.values(), scale=case.config.get("loss_scale", 20.0))
            found[f"design{design}_loss"] = loss[None]
            output = model(**inputs["query"], output_hidden_states=True)
            if design == 1:
                found["causal_last_hidden_valid"] = output.last_hidden_state[valid]
            if design == 4:
                for layer, states in enumerate(output.hidden_states):
                    found[f"bidirectional_hidden_{layer}_valid"] = states[valid]
            results |= {f"{name}@{way}": array for name, array in found.items() if name in case.expected}
    return results
