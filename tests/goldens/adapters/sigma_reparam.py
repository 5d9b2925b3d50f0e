"""sigma-reparam: layers, vision transformers, speech blocks, entropy of attention."""

import torch

from hf_attn.analysis.entropy import attention_entropy, entropy_lower_bound
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.sigma_reparam.convert_sigma_reparam import SPEECH_NAMES, to_official
from tests.goldens.case import Case
from tests.goldens.tools import parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    entries = {
        "attention_entropy / entropy_lower_bound": _entropy,
        "SNLinear": _layer,
        "SNConv2d": _layer,
        "SpeechTransformerBlock": _speech_block,
    }
    return entries.get(case.entry, _vision_transformer)(case)


def _entropy(case: Case) -> dict[str, torch.Tensor]:
    attention = case.input("attn")
    exact, approximate = attention_entropy(attention), attention_entropy(attention, eps=1e-6)
    norms, numbers = case.input("bound_s"), case.input("bound_n")
    return {
        "entropy_exact": exact,
        "entropy_eps1e6": approximate,
        "mean_per_head": exact.mean(dim=(0, 2)),
        "mean_all_eps1e6": approximate.mean()[None],
        "bound": entropy_lower_bound(norms[None, :], numbers[:, None]),
    }


def _layer(case: Case) -> dict[str, torch.Tensor]:
    """Steps of plain SGD, as the case describes, and an evaluation after them."""
    layer = from_official("sigma_reparam", case.weights, config=case.config)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    results, step = {}, 0
    layer.train()
    while f"x{step}" in case.arrays:
        inputs = case.input(f"x{step}").requires_grad_()
        output = layer(inputs)
        results |= {f"y{step}": output, f"u_after{step}": layer.u.clone()}
        (output * case.input(f"proj{step}")).sum().backward()
        gradients = {f"grad_{name}{step}": tensor for name, tensor in _official_gradients(layer).items()}
        results |= {name: gradient for name, gradient in gradients.items() if name in case.expected}
        results[f"grad_x{step}"] = inputs.grad
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    layer.eval()
    results["y_eval"] = layer(case.input("x_eval"))
    return results


def _official_gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {"sigma" if name == "gamma" else name: g.clone() for name, g in parameter_gradients(layer).items()}
    gradients["weight"] = to_official("weight", gradients["weight"])
    return gradients


def _vision_transformer(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("sigma_reparam", case.weights, config=case.config)
    pixel_values = case.input("x").requires_grad_()
    vit, first = model.vit, model.vit.layers[0]
    patches = vit.embeddings.patch_embeddings
    with recorded({"patch_tokens": patches, "block0_out": first}) as seen:
        logits = model(pixel_values).logits
    (logits * case.input("grad_proj")).sum().backward()
    qkv = first.attention.qkv
    return {
        "y": logits,
        **seen,
        "eff_weight_block0_qkv": qkv.effective_weight(),
        "eff_weight_patch_embed": to_official("weight", patches.projection.effective_weight()),
        "grad_x": pixel_values.grad,
        "grad_block0_qkv_weight": qkv.weight.grad,
        "grad_block0_qkv_sigma": qkv.gamma.grad,
        "grad_patch_sigma": patches.projection.gamma.grad,
    }


def _speech_block(case: Case) -> dict[str, torch.Tensor]:
    """Two calls that update the spectral state, as in training mode (the cases have no dropout)."""
    block = from_official("sigma_reparam", case.weights, config=case.config).train()
    hidden_states, lengths = case.input("x").requires_grad_(), case.input("x_length")
    maps = {name: module for name, module in block.named_modules() if hasattr(module, "spectral_norm")}
    norms = {name: module.spectral_norm()[0] for name, module in maps.items()}
    output, entropy = block(hidden_states, lengths)
    (output * case.input("proj")).sum().backward()
    results = {"y": output, "attn_entropy": entropy[None], "grad_x": hidden_states.grad}
    gradients = parameter_gradients(block)
    for name in case.expected:
        if name.startswith("grad."):
            official = f"params.{name.removeprefix('grad.')}"
            results[name] = to_official(official, gradients[SPEECH_NAMES(official)])
        elif name.startswith("after."):
            module, kind = name.removeprefix("after.").split(".")
            ours = SPEECH_NAMES(f"spectral.{module}.u").removesuffix(".u")
            results[name] = maps[ours].u.clone() if kind == "u" else norms[ours][None]
    results["y_second_call"] = block(hidden_states, lengths)[0]
    return results
