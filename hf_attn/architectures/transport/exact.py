"""Exact optimal transport between uniform marginals, by POT's network simplex or else scipy's HiGHS."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    import numpy as np

SOLVERS = ("pot", "scipy")


def available_solvers() -> tuple[str, ...]:
    """The solvers that are installed, the faster one first."""
    return tuple(
        name for name, module in zip(SOLVERS, ("ot", "scipy.optimize"), strict=True) if find_spec(module.split(".")[0])
    )


def exact_plan(
    cost: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
    solver: str | None = None,
) -> torch.Tensor:
    """Plans of least cost, one sample after another on the CPU in float64. They carry no gradient.

    Several plans may be optimal, and solvers differ in which one they find; the cost is the same.

    Args:
        cost: `(batch, n, m)`.
        row_mask: `(batch, n)`, false for rows that do not exist.
        column_mask: `(batch, m)`.
        solver: `"pot"` or `"scipy"`; the first that is installed if not given.

    Returns:
        `(batch, n, m)` in the dtype of the cost.

    Raises:
        ImportError: if the solver is not installed; the message names the installed ones.
        ValueError: for costs that are not finite, and a sample without rows or columns.
    """
    if cost.ndim != 3:
        raise ValueError(f"cost must be (batch, n, m), got {tuple(cost.shape)}.")
    solve = {"pot": _solve_pot, "scipy": _solve_scipy}[_choose(solver)]
    costs = cost.detach().double().cpu().numpy()
    plans = torch.zeros(cost.shape, dtype=torch.float64)
    for index, matrix in enumerate(costs):
        rows, columns = (
            _real(mask, index, size) for mask, size in zip((row_mask, column_mask), matrix.shape, strict=True)
        )
        if not (len(rows) and len(columns)):
            raise ValueError(f"Sample {index} has no tokens: there is nothing to transport. Leave it out.")
        part = matrix[rows.numpy()][:, columns.numpy()]
        if not torch.from_numpy(part).isfinite().all():
            raise ValueError(f"The costs of sample {index} are not finite: the hidden states contain NaN or infinity.")
        plans[index, rows[:, None], columns] = torch.from_numpy(solve(part))
    return plans.to(cost)


def _choose(solver: str | None) -> str:
    there = available_solvers()
    if solver is not None and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if not there or (solver is not None and solver not in there):
        raise ImportError(
            f"Exact transport needs POT (`pip install 'hf_attn[ot]'`) or, slower, scipy. Installed: {', '.join(there) or 'neither'}"
            f"{f', requested: {solver}' if solver else ''}."
        )
    return solver or there[0]


def _real(mask: torch.Tensor | None, index: int, size: int) -> torch.Tensor:
    return torch.arange(size) if mask is None else mask[index].bool().cpu().nonzero().flatten()


def _solve_pot(cost: "np.ndarray") -> "np.ndarray":
    import numpy as np
    import ot

    rows, columns = (np.full(size, 1 / size) for size in cost.shape)
    plan, log = ot.emd(rows, columns, np.ascontiguousarray(cost), numItermax=10_000_000, log=True)
    if log["warning"]:
        raise RuntimeError(f"POT found no exact plan for a {cost.shape[0]} x {cost.shape[1]} cost: {log['warning']}")
    return plan


def _solve_scipy(cost: "np.ndarray", nearest: int = 32) -> "np.ndarray":
    """Linear programme over the cheapest cells of each row and column, to which cells are added while they pay.

    A cell pays if its cost is below the sum of the prices of its row and its column in the solution so far.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    n, m = cost.shape
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    # The cells of the north-west corner rule, so that there is a plan at all.
    edges = np.unique(np.concatenate([np.arange(n) * m, np.arange(m) * n]))
    used = np.zeros((n, m), dtype=bool)
    used[edges // m, edges // n] = True
    rank = min(nearest, n, m) - 1
    used |= cost <= np.partition(cost, min(rank, m - 1), axis=1)[:, [min(rank, m - 1)]]
    used |= cost <= np.partition(cost, min(rank, n - 1), axis=0)[[min(rank, n - 1)]]
    tolerance = 1e-9 * max(1.0, np.abs(cost).max())
    while True:
        rows, columns = used.nonzero()
        cells = np.arange(len(rows))
        constraints = csr_array(
            (np.ones(2 * len(cells)), (np.concatenate([rows, n + columns]), np.concatenate([cells, cells]))),
            shape=(n + m, len(cells)),
        )
        found = linprog(cost[rows, columns], A_eq=constraints, b_eq=marginals, method="highs")
        if not found.success:
            raise RuntimeError(f"scipy found no exact plan for a {n} x {m} cost: {found.message}")
        prices = found.eqlin.marginals
        pays = (cost - prices[:n, None] - prices[None, n:] < -tolerance) & ~used
        if not pays.any():
            plan = np.zeros((n, m))
            plan[rows, columns] = found.x
            return plan
        used |= pays
