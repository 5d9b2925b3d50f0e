"""Names of one layout -> names of another, by ordered rules.

transformers' `WeightRenaming` has one group per pattern and cannot compute an index, which official layouts need.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from .files import ConversionError


#: a regular expression and its replacement, as in [`re.sub`]; a replacement of `None` drops the tensor
Rule = tuple[str, str | Callable[[re.Match], str] | None]

#: takes every name and leaves it as it is; the last rule for a layout most of whose names are ours already
KEEP: Rule = (r"^", "")


class Renaming:
    """Ordered rules for names; each rule is applied to the result of the rules before it.

    A name that no rule matches is unknown. [`state_dict`] leaves its tensor unread, and
    [`~hf_attn.checkpoints.official.from_official`] reports it.

    Args:
        rules: the rules.
    """

    def __init__(self, *rules: Rule):
        self._rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def __call__(self, name: str) -> str:
        """The new name; the old one if no rule matches or if the tensor is dropped."""
        return self._apply(name)[0] or name

    def state_dict(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that are known and not dropped, under their new names.

        Raises:
            ConversionError: if two tensors would get the same name.
        """
        old_names: dict[str, str] = {}
        for name in tensors:
            new, known = self._apply(name)
            if new is None or not known:
                continue
            if new in old_names:
                raise ConversionError(f"{old_names[new]} and {name} would both become {new}.")
            old_names[new] = name
        return {new: tensors[name] for new, name in old_names.items()}

    def dropped(self, names: Mapping | Sequence[str]) -> tuple[str, ...]:
        """The names that a rule drops."""
        return tuple(name for name in names if self._apply(name)[0] is None)

    def unknown(self, names: Mapping | Sequence[str]) -> tuple[str, ...]:
        """The names that no rule matches."""
        return tuple(name for name in names if not self._apply(name)[1])

    def _apply(self, name: str) -> tuple[str | None, bool]:
        known = False
        for pattern, replacement in self._rules:
            if replacement is None:
                if pattern.search(name):
                    return None, True
                continue
            name, count = pattern.subn(replacement, name)
            known = known or bool(count)
        return name, known


def split_fused(
    state: Mapping[str, torch.Tensor], fused: str, parts: Sequence[str] = ("q_proj", "k_proj", "v_proj")
) -> dict[str, torch.Tensor]:
    """Split every tensor of the module `fused`, whose rows are those of several projections, one after the other.

    Args:
        state: names -> tensors.
        fused: name of the module, such as `qkv`.
        parts: names of the projections in the order of their rows.

    Returns:
        The state dict with the parts in place of the fused tensors.
    """
    split = {}
    for name, tensor in state.items():
        owner, found, kind = f".{name}".rpartition(f".{fused}.")
        if not found:
            split[name] = tensor
            continue
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            split[f"{owner}.{part}.{kind}".removeprefix(".")] = rows
    return split
