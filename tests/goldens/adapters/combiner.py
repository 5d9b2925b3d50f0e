"""Combiner: one attention module in each implementation, and the language model."""

import torch

from hf_attn.attention.combiner import COMBINERS, combiner_probabilities
from hf_attn.checkpoints.official import from_official
from hf_attn.kernels.combiner.call import CombinerCall
from tests.goldens.case import Case
from tests.goldens.tools import parameter_gradients


def run(case: Case) -> dict[str, torch.Tensor]:
    return (_language_model if case.config.get("level") == "lm" else _attention)(case)


def _attention(case: Case) -> dict[str, torch.Tensor]:
    module = from_official("combiner", case.weights, config=case.config)
    x = case.input("x").requires_grad_()
    probe = case.optional_input("grad_probe")
    mechanism = COMBINERS[module.config.combiner_kind]
    results = {}
    for implementation, way in (("eager", ""), ("torch", "@torch")):
        module.config._attn_implementation = f"{mechanism.name}_{implementation}"
        module.zero_grad()
        x.grad = None
        y, weights = module(x)
        results[f"y{way}"] = y
        if probe is not None:
            (y * probe).sum().backward()
            results |= {f"{name}{way}": value for name, value in _gradients(module, x, case).items()}
        if weights is not None:
            results["effective_prob"] = weights
    if "joint_softmax" in case.expected:
        results["joint_softmax"] = _official_layout(module, x)
    return {name: value for name, value in results.items() if name.partition("@")[0] in case.expected}


def _gradients(module, x: torch.Tensor, case: Case) -> dict[str, torch.Tensor]:
    gradients = {"grad_x": x.grad}
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        kernel = getattr(module, f"{letter}_proj").weight.grad
        gradients[f"grad_{name}"] = gradients[f"grad_{name}_kernel"] = _kernel(kernel, module)
    return {name: value for name, value in gradients.items() if name in case.expected}


def _kernel(gradient: torch.Tensor, module) -> torch.Tensor:
    """The gradient of a projection as of the official kernel `(width, heads, head_dim)`."""
    return gradient.T.unflatten(1, (-1, module.head_dim))


def _official_layout(module, x: torch.Tensor) -> torch.Tensor:
    """The joint softmax over direct tokens and spans, in the order of the official module."""
    kind, s = module.config.combiner_kind, module.config.combiner_segment_length
    query, key = module.queries_and_keys(x, None)
    call = CombinerCall(query, key, module.values(x), kind=kind, segment_length=s, is_causal=True)
    call.row_key, call.row_input = module.row_keys, x
    direct, spans, _ = combiner_probabilities(call)
    length = x.shape[1]
    rows = -(-length // s)
    order = torch.stack([torch.tensor(_order(kind, i, s, rows, length)) for i in range(length)])
    # The last entry stands for entries that the official softmax masks and ours does not have.
    joint = torch.cat((direct, spans, torch.zeros_like(direct[..., :1])), dim=-1)
    order = torch.where(order < 0, joint.shape[-1] - 1, order)
    joint = joint.gather(3, order.expand(*joint.shape[:2], -1, -1))
    if kind in ("fixed", "logsparse"):
        return joint.transpose(1, 2)
    by_rows = joint.unflatten(2, (rows, s))
    return by_rows.permute(0, 2, 3, 1, 4) if kind == "rowmajor" else by_rows.permute(0, 2, 1, 3, 4)


def _order(kind: str, i: int, s: int, rows: int, length: int) -> list[int]:
    """Positions of the official entries of query `i` among its direct tokens and the spans that follow them."""
    row, column = divmod(i, s)
    own_row = [row * s + c for c in range(s)]
    cells = [a * s + column for a in range(rows)]
    if kind == "fixed":
        return own_row + [length + a for a in range(rows)]
    if kind == "rowmajor":
        return own_row + [length + cell for cell in cells]
    if kind == "mixture":
        vertical = [length + row * s + c for c in range(s)]
        left, right = ([length + k * rows * s + cell for cell in cells] for k in (1, 2))
        above = [cell if a < row else -1 for a, cell in enumerate(cells)]
        return above + own_row + vertical + left + right
    order, offset = [i], length
    for level in range((length - 1).bit_length()):
        order.append(offset + (i >> (level + 1)))
        offset += ((length - 1) >> (level + 1)) + 1
    return order


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("combiner", case.weights, config=case.config)
    input_ids = case.input("input_ids").long()
    mechanism = COMBINERS[model.config.combiner_kind].name
    results = {}
    for implementation, way in (("eager", ""), (mechanism, "@torch")):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(input_ids).logits
        results[f"logits{way}"] = logits
        if "grad_probe" in case.arrays:
            (logits * case.input("grad_probe")).sum().backward()
            gradients = parameter_gradients(model)
            attention = model.model.layers[0].self_attn
            found = {"grad_embedding": gradients["model.embed_tokens.weight"]}
            for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
                found[f"grad_first_{name}_kernel"] = _kernel(
                    gradients[f"model.layers.0.self_attn.{letter}_proj.weight"], attention
                )
            results |= {f"{name}{way}": value for name, value in found.items() if name in case.expected}
    return results
