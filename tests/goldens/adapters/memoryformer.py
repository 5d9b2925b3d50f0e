"""MemoryFormer: one memory layer, and language models."""

import re

import torch

from hf_attn.architectures.memory_layer import MemoryLayer
from hf_attn.checkpoints.official import from_official
from hf_attn.kernels.memory import plain_lookup
from hf_attn.modeling.memoryformer.convert_memoryformer import OUR_NAMES
from tests.goldens.case import Case
from tests.goldens.tools import parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    return _layer(case) if case.config.get("level") == "memory_layer" else _language_model(case)


def _temperature(name: str) -> float:
    """`..._t05` is a temperature of 0.5, and 1 is not in the name."""
    match = re.search(r"_t(\d)(\d*)$", name)
    return float(f"{match[1]}.{match[2] or 0}") if match else 1.0


def _probability(model: torch.nn.Module, temperature: float) -> None:
    for module in model.modules():
        if isinstance(module, MemoryLayer):
            module.bucket_weight, module.temperature = "probability", temperature


def _layer(case: Case) -> dict[str, torch.Tensor]:
    layer = from_official("memoryformer", case.weights, config=case.config)
    states, probe = case.input("x"), case.input("grad_probe")
    results = {}
    for sparse, way in ((False, ""), (True, "@sparse")):
        layer.sparse_gradients = sparse
        layer.zero_grad()
        states = states.detach().requires_grad_()
        output = layer(states)
        (output * probe).sum().backward()
        gradients = {"x": states.grad, "tables": layer.tables.grad.to_dense(), "bias": layer.bias.grad}
        results |= {f"y{way}": output, **{f"grad_{name}{way}": gradient for name, gradient in gradients.items()}}
    rows, weights = layer.hash(states)
    starts = torch.arange(layer.num_tables) << layer.code_length
    results |= {"code": rows - starts, "score": weights}
    results["y@plain"] = (plain_lookup(rows, weights, layer.tables) + layer.bias).view_as(output)
    for name in case.arrays:
        if name.startswith("y_probability"):
            _probability(layer, _temperature(name))
            results[name] = layer(states)
    return {way: array for way, array in results.items() if way.split("@")[0] in case.arrays}


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("memoryformer", case.weights, config=case.config)
    input_ids, probe = case.input("input_ids").long(), case.input("grad_probe")
    # One implementation only: rounding that flips a sign before a hash changes an output visibly.
    model.set_attn_implementation("eager")
    layers = {f"hidden_{index + 1}": layer for index, layer in enumerate(model.model.layers)}
    with recorded(layers) as hidden_states:
        output = model(input_ids, use_cache=False)
    (output.logits * probe).sum().backward()
    results = {"logits": output.logits, **hidden_states}
    results |= {f"grad_{name}": gradient for name, gradient in _gradients(model, case).items()}
    for name in case.arrays:
        if name.startswith("logits_probability"):
            _probability(model, _temperature(name))
            results[name] = model(input_ids, use_cache=False).logits
    return {name: array for name, array in results.items() if name in case.arrays}


def _gradients(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Under the names of the cases, `query_tables_0` of block 0, where the memory layers of the MLP are 1 and 2."""
    ours = parameter_gradients(model)
    official = {name: ours[OUR_NAMES(name)] for name in case.weights}
    named = {
        "word_embeddings": official["sequential.0.word_embeddings.weight"],
        "final_linear": ours["lm_head.weight"],
        "norm": ours["model.norm.weight"],
    }
    for name, gradient in official.items():
        match = re.fullmatch(r"sequential\.(\d+)\.(?:attention\.)?(.+)\.(\w+)", name)
        block = int(match[1]) - 2
        part = {"mlp.0": "mlp1", "mlp.1": "mlp_norm", "mlp.2": "mlp2"}.get(match[2], match[2].removesuffix("_proj"))
        named[f"{part}_{match[3]}_{block}"] = gradient
    return named
