"""Optimal transport: properties of the plans, comparison with POT, and gradients."""

import sys

import numpy as np
import pytest
import torch

from hf_attn.architectures.transport import (
    entropic_plan,
    entropic_plan_eager,
    exact_plan,
    squared_distances,
    transported,
)


ROWS, COLUMNS = torch.ones(3, 11), torch.ones(3, 7)
ROWS[1, 6:] = 0
COLUMNS[2, 3:] = 0
MASKS = (ROWS.bool(), COLUMNS.bool())


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 11, 6, generator=generator), torch.randn(3, 7, 6, generator=generator)


@pytest.fixture
def cost(points):
    return squared_distances(*points, *MASKS)


def marginals(mask: torch.Tensor) -> torch.Tensor:
    return mask / mask.sum(-1, keepdim=True)


def test_costs_are_squared_distances_over_the_largest(points, cost):
    expected = torch.cdist(*points).square() * ROWS[:, :, None] * COLUMNS[:, None]
    torch.testing.assert_close(cost, expected / expected.amax((1, 2), keepdim=True))
    same = torch.ones(1, 4, 3)
    assert squared_distances(same, same).eq(0).all()


@pytest.mark.parametrize("reg", [0.1, 0.02, 0.004])
def test_entropic_plans_have_their_marginals(cost, reg):
    plan = entropic_plan(cost.double(), reg, 3000, *MASKS)
    torch.testing.assert_close(plan.sum(2), marginals(ROWS).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(1), marginals(COLUMNS).double(), atol=1e-6, rtol=0)
    assert not plan[1, 6:].any() and not plan[2, :, 3:].any()


@pytest.mark.parametrize("reg", [0.1, 0.02, 0.004])
def test_entropic_plans_are_those_of_pot(cost, reg):
    ot = pytest.importorskip("ot")
    plans = entropic_plan(cost, reg, 20, *MASKS)
    for plan, matrix, rows, columns in zip(plans, cost.double(), *MASKS, strict=True):
        part = matrix[rows][:, columns].numpy()
        a, b = (np.full(size, 1 / size) for size in part.shape)
        # POT updates the columns first.
        expected = ot.bregman.sinkhorn_log(b, a, part.T.copy(), reg, numItermax=20, stopThr=0, warn=False).T
        # The cost is rounded to float32, and the regularisation amplifies the error.
        np.testing.assert_allclose(plan[rows][:, columns].numpy(), expected, atol=1e-7 / reg)


def test_the_fast_form_has_the_gradients_of_the_equations(cost):
    projection = torch.randn(cost.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for function in (entropic_plan, entropic_plan_eager):
        leaf = cost.double().requires_grad_()
        (function(leaf, 0.1, 20, *MASKS) * projection).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)
    assert gradients[0].abs().max() > 1e-3
    leaf = cost[:, :4, :3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: entropic_plan(c, 0.1, 5), leaf)


def test_gradients_of_a_small_regularisation_are_finite(cost):
    leaf = cost.clone().requires_grad_()
    entropic_plan(leaf, 0.005, 20, *MASKS).square().sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


def test_limits_of_the_regularisation(points):
    points = [half.double() for half in points]
    cost = squared_distances(*points)
    spread = entropic_plan(cost, 1e8, 50)
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / 77))
    target = points[1]
    torch.testing.assert_close(transported(spread, target), target.mean(1, keepdim=True).expand(-1, 11, -1))
    exact = (exact_plan(cost) * cost).sum((1, 2))
    for reg in (0.1, 0.02, 0.002):
        near = (entropic_plan(cost, reg, 5000) * cost).sum((1, 2))
        assert (near >= exact - 1e-6).all()
    torch.testing.assert_close(near, exact, atol=3e-3, rtol=0)


@pytest.mark.parametrize("solver", ["pot", "scipy"])
def test_exact_plans(cost, points, solver):
    pytest.importorskip({"pot": "ot", "scipy": "scipy"}[solver])
    plan = exact_plan(cost, *MASKS, solver=solver)
    torch.testing.assert_close(plan.sum(2), marginals(ROWS))
    torch.testing.assert_close(plan.sum(1), marginals(COLUMNS))
    assert (plan >= 0).all() and not plan.requires_grad
    itself = squared_distances(points[0], points[0])
    torch.testing.assert_close(exact_plan(itself, solver=solver), torch.eye(11).expand(3, -1, -1) / 11)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (30, 2), (40, 57)])
def test_both_solvers_find_the_same_cost(shape):
    pytest.importorskip("ot")
    cost = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).double()
    pot, scipy = ((exact_plan(cost, solver=solver) * cost).sum() for solver in ("pot", "scipy"))
    assert pot.item() == pytest.approx(scipy.item(), abs=1e-9)


def test_the_error_names_the_installed_solvers(cost, monkeypatch):
    monkeypatch.setattr("hf_attn.architectures.transport.exact.find_spec", lambda name: None if name == "ot" else sys)
    assert exact_plan(cost).isfinite().all()
    with pytest.raises(ImportError, match=r"Installed: scipy, requested: pot"):
        exact_plan(cost, solver="pot")
    monkeypatch.setattr("hf_attn.architectures.transport.exact.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Installed: neither"):
        exact_plan(cost)


def test_what_cannot_be_transported_is_refused(cost):
    for plan in (lambda mask: entropic_plan(cost, 0.1, 5, mask), lambda mask: exact_plan(cost, mask)):
        with pytest.raises(ValueError, match="no tokens"):
            plan(torch.zeros(3, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match="reg"):
        entropic_plan(cost, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        exact_plan(cost * torch.nan)
    with pytest.raises(ValueError, match="solver"):
        exact_plan(cost, solver="cplex")
    with pytest.raises(ValueError, match="batch"):
        entropic_plan(cost[0], 0.1)


def test_half_precision_is_computed_in_float32(cost):
    plan = entropic_plan(cost.bfloat16(), 0.1, 50)
    assert plan.dtype == torch.float32 and plan.isfinite().all()
