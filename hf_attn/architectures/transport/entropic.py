"""Entropic optimal transport (Sinkhorn), batched over samples and differentiable.

The plan minimises `<P, c> + reg * sum P (log P - 1)` over plans with the given marginals. A sweep updates the rows first,
then the columns, and the first one starts from zero potentials of the columns. (POT's `sinkhorn_log` updates the columns
first: it makes the same plan, transposed, of the transposed cost.)
"""

import torch
from torch.autograd.function import once_differentiable


#: the least `reg`, for costs of at most 1, for which the scaling form stays far from the limits of float32:
#: its factors lie between exp(-1 / reg) and exp(1 / reg)
SMALLEST_SCALING_REG = 0.02


def _marginals(cost: torch.Tensor, row_mask: torch.Tensor | None, column_mask: torch.Tensor | None):
    """Uniform weights of real rows and columns, `(batch, n)` and `(batch, m)`; padding has none."""
    weights = []
    for mask, axis in ((row_mask, -2), (column_mask, -1)):
        if mask is None:
            weights.append(cost.new_full((cost.shape[0], cost.shape[axis]), 1 / cost.shape[axis]))
            continue
        if not (torch.compiler.is_compiling() or bool(mask.any(-1).all())):
            raise ValueError("A sample has no tokens: there is nothing to transport. Leave empty samples out.")
        mask = mask.to(cost.dtype)
        weights.append(mask / mask.sum(-1, keepdim=True))
    return weights


def entropic_plan_eager(
    cost: torch.Tensor,
    reg: float,
    num_iterations: int,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sweeps as in the equations, in the log domain; see [`entropic_plan`].

        f_i = reg log a_i - reg LSE_j((g_j - c_ij) / reg),   g_j = reg log b_j - reg LSE_i((f_i - c_ij) / reg)
        P = exp((f_i + g_j - c_ij) / reg)

    Autograd stores the results of every sweep.
    """
    row_weights, column_weights = _marginals(cost, row_mask, column_mask)
    log_a, log_b = (
        torch.where(w > 0, w, 1).log().masked_fill(w == 0, -torch.inf) for w in (row_weights, column_weights)
    )
    scaled = -cost / reg
    # Finite potentials everywhere: minus infinity in a row of minus infinities has no gradient.
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    rows, columns = (row_weights > 0).unsqueeze(-1), (column_weights > 0).unsqueeze(-2)
    real = rows & columns
    scaled = scaled.masked_fill(~real, torch.finfo(scaled.dtype).min / 4)
    for _ in range(num_iterations):
        f = torch.where(row_weights > 0, log_a - torch.logsumexp(scaled + g.unsqueeze(-2), -1), 0)
        g = torch.where(column_weights > 0, log_b - torch.logsumexp(scaled + f.unsqueeze(-1), -2), 0)
    return (scaled + f.unsqueeze(-1) + g.unsqueeze(-2)).exp().masked_fill(~real, 0)


class _ScalingSweeps(torch.autograd.Function):
    """The same sweeps on u = exp(f / reg) and v = exp(g / reg), which are products with exp(-c / reg).

    Only the factors of each sweep are kept. The backward pass runs the sweeps in reverse with gradients of log u and log v,
    and adds up what they give to the cost in one product.
    """

    @staticmethod
    def forward(ctx, cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, reg: float, num_iterations: int):
        kernel = (cost / -reg).exp_().contiguous()
        flipped = kernel.mT.contiguous()
        us, vs = cost.new_empty(num_iterations, *a.shape), cost.new_empty(num_iterations + 1, *b.shape)
        vs[0] = b > 0  # padding takes no part in the first sweep
        for index in range(num_iterations):
            torch.div(a, _product(vs[index], flipped), out=us[index])
            torch.div(b, _product(us[index], kernel), out=vs[index + 1])
        plan = kernel * us[-1].unsqueeze(-1) * vs[-1].unsqueeze(-2)
        ctx.save_for_backward(kernel, flipped, us, vs, a, b, plan)
        ctx.reg = reg
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        kernel, flipped, us, vs, a, b, plan = ctx.saved_tensors
        a, b = torch.where(a > 0, a, 1), torch.where(b > 0, b, 1)
        direct = grad * plan
        grad_log_u, grad_log_v = direct.sum(-1), direct.sum(-2)
        left, right = torch.empty_like(us), torch.empty_like(vs[1:])
        for index in reversed(range(len(us))):
            # log v = log b - LSE_i(log K_ij + log u_i), and the weights of the LSE are K_ij u_i v_j / b_j.
            right[index] = vs[index + 1] / b * grad_log_v
            grad_log_u = grad_log_u - us[index] * _product(right[index], flipped)
            left[index] = us[index] / a * grad_log_u
            grad_log_v = -vs[index] * _product(left[index], kernel)
            grad_log_u = 0
        grad_log_kernel = direct - kernel * (_outer(us, right) + _outer(left, vs[:-1]))
        grad_cost = grad_log_kernel / -ctx.reg
        return grad_cost, None, None, None, None


def _product(vectors: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    # Rows times contiguous matrices: torch is nine times slower on CPUs with matrices times columns.
    return torch.bmm(vectors.unsqueeze(-2), matrices).squeeze(-2)


def _outer(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Outer products `(batch, n, m)`, summed over sweeps."""
    return torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1))


def entropic_plan(
    cost: torch.Tensor,
    reg: float,
    num_iterations: int = 50,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Entropic transport plans between uniform marginals.

    Args:
        cost: `(batch, n, m)`, at most 1 in size ([`~hf_attn.architectures.transport.squared_distances`] sees to that);
            larger ones are computed in the log domain.
        reg: weight of the entropy, the epsilon of the papers and POT's `reg_e`.
        num_iterations: sweeps.
        row_mask: `(batch, n)`, false for rows that do not exist.
        column_mask: `(batch, m)`.

    Returns:
        `(batch, n, m)`; columns have their sums exactly, rows after convergence.

    Raises:
        ValueError: for numbers that are out of range, and a sample without rows or columns.
    """
    if cost.ndim != 3:
        raise ValueError(f"cost must be (batch, n, m), got {tuple(cost.shape)}.")
    if reg <= 0 or num_iterations < 1:
        raise ValueError(f"reg must be positive and num_iterations at least 1, got {reg} and {num_iterations}.")
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.float()
    largest = 1.0 if torch.compiler.is_compiling() or cost.numel() == 0 else cost.detach().abs().max().item()
    if reg < SMALLEST_SCALING_REG * max(largest, 1.0):
        return entropic_plan_eager(cost, reg, num_iterations, row_mask, column_mask)
    a, b = _marginals(cost, row_mask, column_mask)
    return _ScalingSweeps.apply(cost, a, b, reg, num_iterations)
