"""Helpers for adapters."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .case import Case


@contextmanager
def recorded(modules: Mapping[str, nn.Module], inputs: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Record what modules return (the first element of a tuple) or, with `inputs`, their first positional argument."""
    seen = {}

    def hook_for(name: str):
        def hook(module, arguments, output):
            value = arguments if inputs else output
            seen[name] = value[0] if isinstance(value, tuple) else value

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def parameter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, zeros where there is none; a tied parameter has all its names."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def find_key(abbreviation: Iterable[str], keys: Iterable[str]) -> str:
    """The one key of a state dict that an abbreviated name means.

    Args:
        abbreviation: words that the last words of the key have to be, with or without a final `weight`.
        keys: the keys, words joined by `.`, `_` or `/`.

    Raises:
        LookupError: if none or several fit.
    """
    wanted = list(abbreviation)

    def forms(key: str) -> list[list[str]]:
        words = key.replace("/", ".").replace("_", ".").split(".")
        return [words, words[:-1]] if words[-1] == "weight" else [words]

    keys = list(keys)
    found = [key for key in keys if wanted in forms(key)]
    found = found or [key for key in keys if any(form[-len(wanted) :] == wanted for form in forms(key))]
    if len(found) != 1:
        raise LookupError(f"{'_'.join(wanted)!r} means {found or 'no key'} of the checkpoint.")
    return found[0]


def expected_gradients(case: Case, official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients that a case expects, under its names.

    Args:
        case: where they are called `grad.<key>`, or `grad_` and an abbreviated key (`grad_block0_qkv` means
            `blocks.0.attn.qkv.weight`).
        official: gradients by official key.
    """
    gradients = {}
    for name in case.expected:
        if name.startswith("grad."):
            gradients[name] = official[name.removeprefix("grad.")]
        elif name.startswith("grad_"):
            words = re.sub(r"^block(\d+)", r"blocks_\1", name.removeprefix("grad_")).split("_")
            candidates = official
            if words[0] == "blocks":
                candidates = {key for key in official if key.startswith(f"blocks.{words[1]}.")}
                words = words[2:]
            gradients[name] = official[find_key(words, candidates)]
    return gradients
