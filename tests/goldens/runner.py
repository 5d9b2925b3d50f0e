"""Runs a case through its paper's adapter and compares everything that the case expects."""

import traceback
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from .case import Case


@dataclass
class Result:
    """The result of a case.

    Attributes:
        case: name of the case.
        compared: array -> its largest error as a fraction of its tolerance (infinite if it cannot be compared at all).
        not_compared: array -> reason why it was left out.
        problems: what is wrong, one line per problem.
    """

    case: str
    compared: dict[str, float] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{'pass' if self.passed else 'FAIL'}  {self.case}: {len(self.compared)} arrays compared"]
        if self.compared:
            worst = max(self.compared, key=self.compared.get)
            lines[0] += f", worst error {self.compared[worst]:.3g} of its tolerance ({worst})"
        lines += [f"      {problem}" for problem in self.problems]
        lines += [f"      not compared: {name} ({reason})" for name, reason in self.not_compared.items()]
        return "\n".join(lines)


def run_case(case: Case) -> Result:
    """Run and compare a case; every error becomes a problem of the result, never an exception."""
    try:
        result = Result(case.name)
    except Exception as error:
        return Result(str(case.folder), problems=[f"cannot be read: {error!r}"])
    try:
        adapter = _adapter(case.paper)
        torch.manual_seed(0)
        computed = adapter.run(case)
    except Exception:
        result.problems.append(f"cannot be run: {traceback.format_exc()}")
        return result

    expected = case.expected
    result.not_compared = _left_out(adapter, case, [name for name in expected if not _ways(computed, name)])
    for name, array in expected.items():
        for way in _ways(computed, name):
            error, problem = _compare(computed[way], array, *case.tolerance(name))
            result.compared[way] = error
            if problem:
                result.problems.append(f"{way}: {problem}")
        if not _ways(computed, name) and name not in result.not_compared:
            what = "input not used" if name in case.info["inputs"] else "expected array not computed"
            result.problems.append(f"{name}: {what}")
    if not result.compared:
        result.problems.append("nothing was compared")
    return result


def _adapter(paper: str) -> ModuleType:
    name = f"{__package__}.adapters.{paper}"
    if find_spec(name) is None:
        raise LookupError(f"There is no adapter for {paper!r}: add tests/goldens/adapters/{paper}.py.")
    return import_module(name)


def _ways(computed: dict[str, torch.Tensor], name: str) -> list[str]:
    return [way for way in computed if way == name or way.startswith(f"{name}@")]


def _left_out(adapter: ModuleType, case: Case, names: list[str]) -> dict[str, str]:
    """Arrays without a computed counterpart for which the adapter gives a reason; gradients are never left out."""
    reasons = getattr(adapter, "NOT_EXPOSED", {})
    return {
        name: reason
        for name in names
        if not name.startswith("grad")
        for pattern, reason in reasons.items()
        if fnmatchcase(name, pattern)
    }


def _compare(computed: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> tuple[float, str]:
    """The largest error as a fraction of the tolerance, and what is wrong, if anything."""
    if computed.shape != expected.shape:
        return float("inf"), f"shape {tuple(computed.shape)} instead of {tuple(expected.shape)}"
    if computed.is_floating_point() != expected.is_floating_point() or computed.is_complex() != expected.is_complex():
        return float("inf"), f"{computed.dtype} instead of {expected.dtype}"
    if computed.is_floating_point() and computed.dtype.itemsize < 4:
        return float("inf"), f"{computed.dtype} is too narrow for the expected {expected.dtype}"
    if not (expected.is_floating_point() or expected.is_complex()):
        different = int((computed != expected).sum())
        problem = f"{different} of {expected.numel()} entries differ" if different else ""
        return float("inf") if different else 0.0, problem
    if expected.numel() == 0:
        return 0.0, ""

    wide = torch.complex128 if expected.is_complex() else torch.float64
    computed, expected = computed.detach().to(wide), expected.to(wide)
    equal = (computed == expected) | (computed.isnan() & expected.isnan())
    error = (computed - expected).abs()
    allowed = atol + rtol * expected.abs()
    fraction = torch.where(equal, 0.0, torch.where(allowed > 0, error / allowed, torch.inf)).nan_to_num(nan=torch.inf)
    worst = fraction.max().item()
    if worst > 1:
        index = tuple(int(i) for i in torch.unravel_index(fraction.argmax(), fraction.shape))
        count = int((fraction > 1).sum())
        return worst, (
            f"{count} of {expected.numel()} entries beyond tolerance (atol {atol:g}, rtol {rtol:g}); the worst, at {index}, is "
            f"{computed[index].item():.7g} instead of {expected[index].item():.7g}"
        )
    return worst, ""
