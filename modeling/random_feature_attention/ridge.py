"""Ridge regression on features, in float64: `min_v (1/n) |y - Phi v|^2 + lambda |v|^2`."""

import math

import torch


#: the Gram matrix is computed in as many strips of rows, none with fewer rows than make a product efficient
_STRIPS, _MIN_ROWS = 8, 64


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """`Phi Phi^T` `(n, n)`, of which only the lower triangle is multiplied out; the upper one is its mirror.

    It does not depend on the targets: compute it once for a model and its inputs, and pass it to [`ridge_dual`] for each
    target and each penalty.
    """
    n = len(features)
    gram = features.new_zeros(n, n)
    strip = max(_MIN_ROWS, -(-n // _STRIPS))
    for start in range(0, n, strip):
        stop = min(start + strip, n)
        torch.matmul(features[start:stop], features[:stop].T, out=gram[start:stop, :stop])
        gram[:start, start:stop] = gram[start:stop, :start].T
    return gram


def ridge_dual(gram: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Coefficients `(Phi Phi^T + n lambda I)^-1 y`; the values are `Phi^T` times these.

    Args:
        gram: `(n, n)`, of the features.
        targets: `(n,)`, or `(n, targets)` for several at once.
        penalty: lambda.

    Raises:
        ValueError: if lambda is negative, or 0 with a singular matrix.
    """
    return _solve(gram, targets, check_penalty(penalty) * len(gram), "distinct samples, fewer than features")


def ridge_primal(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Values `(Phi^T Phi / n + lambda I)^-1 Phi^T y / n`; arguments as in [`ridge_dual`]."""
    n = len(features)
    covariance = gram_matrix(features.T.contiguous()) / n
    return _solve(covariance, features.T @ targets / n, check_penalty(penalty), "at least as many samples as features")


def ridge_values(features: torch.Tensor, targets: torch.Tensor, penalty: float, solver: str = "auto") -> torch.Tensor:
    """The values `v` that minimise `(1/n) |y - Phi v|^2 + lambda |v|^2`.

    Args:
        features: `(n, p)`; converted to float64.
        targets: `(n,)` or `(n, targets)`.
        penalty: lambda, at least 0.
        solver: `"primal"` solves for `p` unknowns, `"dual"` for `n`, `"auto"` for the fewer.

    Returns:
        `(p,)` or `(p, targets)` in float64.

    Raises:
        ValueError: for a negative lambda, an unknown solver, no samples, or as many targets as there are not.
    """
    if solver not in ("auto", "primal", "dual"):
        raise ValueError(f"solver must be 'auto', 'primal' or 'dual', got {solver!r}.")
    check_penalty(penalty)
    if len(features) == 0:
        raise ValueError("A ridge fit needs at least one sample, got none.")
    if len(features) != len(targets):
        raise ValueError(f"Got {len(features)} samples but {len(targets)} targets.")
    features, targets = features.double(), targets.to(features.device).double()
    if not (bool(features.isfinite().all()) and bool(targets.isfinite().all())):
        raise ValueError("The inputs or the targets contain NaN or infinity.")
    if solver == "primal" or (solver == "auto" and features.shape[0] > features.shape[1]):
        return ridge_primal(features, targets, penalty)
    return features.T @ ridge_dual(gram_matrix(features), targets, penalty)


def check_penalty(penalty: float) -> float:
    """Return lambda if it is a number of at least 0, else raise `ValueError`."""
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"The ridge penalty lambda must be a number of at least 0, got {penalty}.")
    return penalty


def _solve(matrix: torch.Tensor, right: torch.Tensor, shift: float, otherwise: str) -> torch.Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    columns = right if right.ndim == 2 else right[:, None]
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if not bool(failed):
        solution = torch.cholesky_solve(columns, factor)
    elif shift > 0:
        # The shift is below the rounding of the matrix, whose eigenvalues are not negative in truth.
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        solution = vectors @ ((vectors.T @ columns) / (eigenvalues.clamp(min=0) + shift)[:, None])
    else:
        raise ValueError(
            f"Without a penalty the problem is singular: use a lambda above 0, or (with this solver) {otherwise}."
        )
    return solution if right.ndim == 2 else solution[:, 0]
