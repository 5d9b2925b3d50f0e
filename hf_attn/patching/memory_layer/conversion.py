"""Conversion of linear layers of a pretrained model to memory layers that are fitted to its activations."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...architectures.memory_layer import MemoryLayer
from ...kernels.memory import gradient_of_tables, lookup


@dataclass(frozen=True)
class LayerFit:
    """How well a memory layer approximates the linear layer.

    Attributes:
        name: of the layer in the model.
        tokens: number of tokens that it was fitted to.
        first_error: relative error on held-out tokens before the fit, with tables that follow from the matrix.
        error: the same after the fit: `|y - y'| / |y - mean(y)|`; a constant prediction has an error of 1.
    """

    name: str
    tokens: int
    first_error: float
    error: float

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3f} (before the fit {self.first_error:.3f}), {self.tokens:,} tokens"


@dataclass(frozen=True)
class MemoryConversion:
    """What [`convert_linear`] did.

    Attributes:
        names: the layers that were replaced.
        fits: one for each, in the order of the fit; none without batches.
    """

    names: tuple[str, ...]
    fits: tuple[LayerFit, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self.fits)) or f"{len(self.names)} layers replaced, none fitted"


def convert_linear(
    model: nn.Module,
    targets: str | Iterable[str],
    batches: Iterable[Any] | None = None,
    *,
    code_length: int = 8,
    bucket_weight: str = "l1_scaled",
    iterations: int = 30,
    max_tokens: int = 16384,
    progress: bool = True,
) -> MemoryConversion:
    """Replace linear layers by memory layers, in place, one after the other.

    Each layer gets the inputs that reach it when the earlier ones have been replaced, and is fitted to the outputs of the
    matrix for these. For given inputs the output is linear in the tables, so the fit is a least-squares problem. It starts from
    the tables that the matrix gives for the mean of each bucket, and ends when the error on the last fifth of the tokens, which
    is held out, grows.

    `from_pretrained` does not know of the change. Save `model.state_dict()`; to load it, convert the same model again without
    batches.

    Args:
        model: a model; it is run in eval mode, and its mode is restored.
        targets: the layers: last parts of their names (`["q_proj", "up_proj"]`), or a regular expression for the whole name.
        batches: inputs of the model, dictionaries or tensors of token ids; they are run once for each layer. Without them
            the layers are replaced and not fitted.
        code_length: channels of a chunk; each layer's `in_features` must be a multiple.
        bucket_weight: see [`~hf_attn.architectures.memory_layer.MemoryLayer`].
        iterations: of the fit, at most.
        max_tokens: number of tokens that are used, at most.
        progress: whether to show a progress bar and the error of each layer.

    Raises:
        ValueError: if no layer fits `targets`, if one is tied or has a width that is not a multiple of `code_length`, or if there
            are too few tokens.
    """
    names = _find(model, targets, code_length)
    batches = None if batches is None else list(batches)
    fits = []
    bar = tqdm(names, desc="Memory layers", unit="layer", disable=not progress)
    for name in bar:
        linear = model.get_submodule(name)
        memory = MemoryLayer(
            linear.in_features,
            linear.out_features,
            code_length,
            bias=linear.bias is not None,
            bucket_weight=bucket_weight,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        if batches is not None:
            inputs = _inputs_of(model, linear, batches, max_tokens)
            fits.append(_fit(name, linear, memory, inputs, iterations))
            if progress:
                bar.write(str(fits[-1]))
        memory.requires_grad_(linear.weight.requires_grad)
        model.set_submodule(name, memory.train(linear.training))
    return MemoryConversion(tuple(names), tuple(fits))


def _find(model: nn.Module, targets: str | Iterable[str], code_length: int) -> list[str]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        names = [name for name in linears if re.fullmatch(targets, name)]
    else:
        targets = list(targets)
        names = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not names:
        raise ValueError(f"No linear layer fits {targets!r}. The model has {', '.join(list(linears)[:12])}...")
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    for name in names:
        linear = linears[name]
        if shared[id(linear.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module and cannot be replaced.")
        if linear.in_features % code_length != 0:
            raise ValueError(
                f"{name} has {linear.in_features} inputs, which is not a multiple of code_length={code_length}."
            )
    return names


class _Enough(Exception):
    """Raised when the layer has been reached, to skip the rest of the forward pass."""


@torch.no_grad()
def _inputs_of(model: nn.Module, linear: nn.Linear, batches: list, max_tokens: int) -> torch.Tensor:
    """Inputs `(tokens, in_features)` of a layer."""
    found: list[torch.Tensor] = []

    def keep(module, arguments):
        found.append(arguments[0].flatten(0, -2))
        raise _Enough

    training = model.training
    handle = linear.register_forward_pre_hook(keep)
    device = linear.weight.device
    try:
        model.eval()
        for batch in batches:
            try:
                if isinstance(batch, Mapping):
                    model(**{name: value.to(device) for name, value in batch.items()})
                else:
                    model(batch.to(device))
            except _Enough:
                pass
            if sum(map(len, found)) >= max_tokens:
                break
    finally:
        handle.remove()
        model.train(training)
    tokens = torch.cat(found)[:max_tokens] if found else torch.empty(0, linear.in_features)
    if len(tokens) < 10:
        raise ValueError(
            f"The batches contain {len(tokens)} tokens; a fit needs at least 10, and several thousand are better."
        )
    return tokens


def _error(output: torch.Tensor, target: torch.Tensor) -> float:
    spread = (target - target.mean(0)).norm()
    return ((output - target).norm() / spread.clamp(min=torch.finfo(target.dtype).tiny)).item()


@torch.no_grad()
def _fit(name: str, linear: nn.Linear, memory: MemoryLayer, inputs: torch.Tensor, iterations: int) -> LayerFit:
    """Conjugate gradients on the tables (CGLS), in float32, until the error on held-out tokens grows."""
    inputs = inputs.float()
    weight = linear.weight.float()
    target = inputs @ weight.T
    rows, weights = memory.hash(inputs)
    held_out = max(len(inputs) // 5, 1)
    fitted, unseen = slice(None, -held_out), slice(-held_out, None)

    tables = _tables_of_matrix(weight, inputs[fitted], rows[fitted], weights[fitted], memory)
    best = tables.clone()
    first_error = error = _error(lookup(rows[unseen], weights[unseen], tables), target[unseen])
    residual = target[fitted] - lookup(rows[fitted], weights[fitted], tables)
    gradient = gradient_of_tables(rows[fitted], weights[fitted], tables, residual)
    direction, size = gradient, gradient.square().sum()
    for _ in range(iterations):
        if size <= 0:
            break
        change = lookup(rows[fitted], weights[fitted], direction)
        step = size / change.square().sum().clamp(min=torch.finfo(size.dtype).tiny)
        tables += step * direction
        residual -= step * change
        now = _error(lookup(rows[unseen], weights[unseen], tables), target[unseen])
        if now >= error:
            break
        error, best = now, tables.clone()
        gradient = gradient_of_tables(rows[fitted], weights[fitted], tables, residual)
        before, size = size, gradient.square().sum()
        direction = gradient + size / before * direction
    memory.tables.copy_(best)
    if linear.bias is not None:
        memory.bias.copy_(linear.bias)
    return LayerFit(name, len(inputs) - held_out, first_error, error)


def _tables_of_matrix(
    weight: torch.Tensor, inputs: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, memory: MemoryLayer
) -> torch.Tensor:
    """For each bucket what its chunk of the matrix does to the chunk's mean there; for a bucket without tokens that mean is the
    mean magnitude of each channel with the signs of the bucket."""
    num_tables, length = memory.num_tables, memory.code_length
    chunks = inputs.unflatten(-1, (num_tables, length))
    size = num_tables << length
    # Least squares of w T = W z in each bucket: T = W (sum w z / sum w^2).
    sums = torch.zeros(size, length, device=inputs.device)
    sums.index_add_(0, rows.flatten(), (weights[..., None] * chunks).flatten(0, 1))
    squares = torch.zeros(size, device=inputs.device).index_add_(0, rows.flatten(), weights.square().flatten())
    powers = 1 << torch.arange(length - 1, -1, -1, device=inputs.device)
    signs = (torch.arange(1 << length, device=inputs.device)[:, None] // powers % 2) * 2.0 - 1.0
    typical = chunks.abs().mean(0)
    guess = (signs[:, None] * typical).flatten(1)
    guess_rows, guess_weights = memory.hash(guess)
    means = torch.zeros(size, length, device=inputs.device)
    means[guess_rows.flatten()] = (
        guess.unflatten(-1, (num_tables, length)) / guess_weights.clamp(min=1e-6)[..., None]
    ).flatten(0, 1)
    seen = squares > 0
    means[seen] = sums[seen] / squares[seen, None]
    means = means.unflatten(0, (num_tables, -1))
    return torch.einsum("kcl,okl->kco", means, weight.unflatten(-1, (num_tables, length))).flatten(0, 1)
