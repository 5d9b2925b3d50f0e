"""A golden case: outputs of a paper's official code with small random weights."""

import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass
class Case:
    """One folder with `case.json`, `weights.safetensors` and `io.safetensors`.

    Attributes:
        folder: its folder.
        used: names of the arrays that the adapter has used as inputs.
    """

    folder: Path
    used: set[str] = field(default_factory=set)

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The official state dict; empty for a case of a function without weights."""
        weights = load_file(self.folder / "weights.safetensors")
        weights.pop("_none", None)
        return weights

    @property
    def paper(self) -> str:
        return self.info["paper"]

    @property
    def name(self) -> str:
        return f"{self.paper}/{self.folder.name}"

    @property
    def entry(self) -> str:
        return self.info["entry"]

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    def input(self, name: str) -> torch.Tensor:
        """An input array, or the projection that turns an output into a loss.

        Raises:
            ValueError: for an array that is documented as an output and therefore has to be compared.
        """
        if name in self.info["outputs"] and not name.removeprefix("grad_").startswith("proj"):
            raise ValueError(
                f"The adapter of {self.paper} takes {name!r} as an input, but it is an output of {self.name}."
            )
        self.used.add(name)
        return self.arrays[name]

    def optional_input(self, name: str) -> torch.Tensor | None:
        """An input array that only some cases have."""
        return self.input(name) if name in self.arrays else None

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        """The arrays that have to be compared, or used as inputs, once the adapter has run."""
        return {name: array for name, array in self.arrays.items() if name not in self.used}

    def tolerance(self, name: str) -> tuple[float, float]:
        """`(atol, rtol)` of an expected array."""
        tolerance = self.info["tolerance"]
        if name.startswith("grad"):
            tolerance = self.info.get("tolerance_grad", tolerance)
        for pattern, override in self.info.get("tolerance_overrides", {}).items():
            if fnmatchcase(name, pattern):
                tolerance = override
        if "atol_relative_to_max" in tolerance:
            return tolerance["atol_relative_to_max"] * self.arrays[name].abs().max().item(), 0.0
        return tolerance["atol"], tolerance["rtol"]


def find_cases(*folders: Path) -> list[Case]:
    """All cases in or below folders, which may be cases themselves.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no case.
    """
    cases = []
    for folder in folders:
        found = sorted(folder.rglob("case.json"))
        if not found:
            raise FileNotFoundError(f"There is no case.json in or below {folder}.")
        cases += [Case(path.parent) for path in found]
    return cases
