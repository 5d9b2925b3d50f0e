"""Layers that a model does not call: it reads their weight, and computes with W where W_hat is meant.

timm's EVA02 and BEiT do so with `qkv`, WavLM with all projections of its attention, Mamba with `dt_proj`. Such layers cannot be
reparametrised. [`weights_read_by`] finds them in the source of the modules, before anything is run;
[`bypassed_layers`] in a run of the model, however it reads them.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from .layers import SigmaReparamLayer


#: attributes of a weight that can be read without computing with it
_FACTS = {"device", "dtype", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_floating_point"}
_ABOUT = {"isinstance", "hasattr", "type", "id"}
_Path = tuple[str, ...]


def is_read(model: nn.Module, name: str) -> bool:
    """Whether the source of a module around a layer says that it reads the layer's weight in its forward pass.

    Args:
        model: the model.
        name: of the layer in the model.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        below = tuple(part for part in parts[depth:] if not part.isdigit())
        if below in weights_read_by(type(model.get_submodule(".".join(parts[:depth])))):
            return True
    return False


@cache
def weights_read_by(module_class: type[nn.Module]) -> frozenset[_Path]:
    """Layers whose weight the `forward` of a class, or a method that it uses, computes with; none if there is no source.

    Returns:
        Their paths below the module without indices, such as `("attn", "qkv")`.
    """
    # The fast path of torch's encoder layer is closed by a hook, see `apply_sigma_reparam`.
    if issubclass(module_class, nn.TransformerEncoderLayer):
        return frozenset()
    methods: dict[str, ast.AST] = {}
    for each in module_class.__mro__:
        if each not in (nn.Module, object):
            methods = {**dict(_methods(each)), **methods}
    reached, waiting, paths = set(), ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in reached or name not in methods:
            continue
        reached.add(name)
        parents = {child: parent for parent in ast.walk(methods[name]) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(methods[name]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                waiting.append(node.attr)
            if isinstance(node, ast.Attribute) and node.attr == "weight" and _is_computed_with(node, parents):
                paths.add(_path_below_self(node.value))
    return frozenset(path for path in paths if path)


def _methods(each: type) -> Iterator[tuple[str, ast.AST]]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node


def _is_computed_with(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _FACTS
    is_about = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _ABOUT
    is_test = isinstance(parent, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    return isinstance(node.ctx, ast.Load) and not is_about and not is_test


def _path_below_self(node: ast.AST) -> _Path:
    path: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
        node = node.value
    return tuple(path) if isinstance(node, ast.Name) and node.id == "self" else ()


def bypassed_layers(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[str, ...]:
    """Find the reparametrised layers whose weight a model reads instead of calling them, by running it once.

    The weight of a layer that is called has a gradient without a component along itself, and its gamma has one. A weight that
    is read has a gradient of its own. Layers that the run does not need at all are not reported.

    Args:
        model: with reparametrised layers, in the mode in which it is used. Neither gradients nor u are changed.
        run: calls the model on a typical input and returns its output, such as `lambda model: model(**inputs)`.

    Returns:
        Names of the layers. Name them in `exclude` of [`apply_sigma_reparam`], or give that function `run`.

    Raises:
        ValueError: if the model has no reparametrised layers, or no output depends on them.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SigmaReparamLayer) and not layer.stats_only
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no reparametrised layers.")
    before = [
        (layer, layer.weight.requires_grad, layer.gamma.requires_grad, layer.u.clone()) for layer in layers.values()
    ]
    parameters = [parameter for layer in layers.values() for parameter in (layer.weight, layer.gamma)]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            outputs = [
                leaf
                for leaf in _pytree.tree_leaves(run(model))
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.isfinite().any()
            ]
            if not outputs:
                raise ValueError(
                    "No output of the run depends on the reparametrised layers: `run` must return the outputs of the "
                    "model, with gradients."
                )
            total = sum(leaf.float().nan_to_num(0, 0, 0).square().sum() for leaf in outputs)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        for layer, weight_grad, gamma_grad, u in before:
            layer.weight.requires_grad_(weight_grad)
            layer.gamma.requires_grad_(gamma_grad)
            with torch.no_grad():
                layer.u.copy_(u)
    found = []
    for (name, layer), of_weight, of_gamma in zip(layers.items(), gradients[::2], gradients[1::2], strict=True):
        if of_weight is not None and (of_gamma is None or _has_part_along(of_weight, layer.weight)):
            found.append(name)
    return tuple(found)


def _has_part_along(gradient: torch.Tensor, weight: torch.Tensor) -> bool:
    # Rounding of the gradient gives it a small part along the weight, in bfloat16 of about 1e-3.
    tolerance = max(1e-3, 4 * torch.finfo(weight.dtype).eps)
    gradient, weight = gradient.detach().double().flatten(), weight.detach().double().flatten()
    return bool((gradient @ weight).abs() > tolerance * gradient.norm() * weight.norm())
