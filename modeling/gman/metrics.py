"""Errors of forecasts, with missing values left out."""

import numpy as np
import torch


def observed_values(
    values: torch.Tensor, null_value: float | None, observed_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Where values are measurements: not NaN, not `null_value`, and not 0 in the mask."""
    observed = ~values.isnan()
    if null_value is not None:
        observed = observed & (values != null_value)
    if observed_mask is not None:
        observed = observed & observed_mask.to(values.device, torch.bool)
    return observed


def masked_mae(predictions: torch.Tensor, values: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over the observed values of a batch; 0 if there are none."""
    errors = (predictions - values.to(predictions.dtype)).abs().masked_fill(~observed, 0)
    return errors.sum() / observed.sum().clamp(min=1)


def forecast_errors(
    predictions: np.ndarray, values: np.ndarray, null_value: float | None = 0.0
) -> dict[str, np.ndarray]:
    """Errors of each step, and of all steps together.

    Args:
        predictions: `(windows, steps, nodes)`.
        values: the truth, of the same shape. NaN and `null_value` are left out.
        null_value: value that marks missing data, if there is one.

    Returns:
        "mae", "rmse" and "mape" (a fraction; true values of zero are left out of it), each of `steps + 1` numbers. The last
        is over all values of all steps, not the mean of the others. NaN where nothing was observed.

    Raises:
        ValueError: if the shapes differ.
    """
    predictions, values = np.asarray(predictions, np.float64), np.asarray(values, np.float64)
    if predictions.shape != values.shape or values.ndim != 3:
        raise ValueError(
            f"Forecasts and true values must have the same shape (windows, steps, nodes), got {predictions.shape} and "
            f"{values.shape}."
        )
    observed = ~np.isnan(values)
    if null_value is not None:
        observed &= values != null_value
    differences = np.where(observed, predictions - values, 0.0)
    not_zero = observed & (values != 0)
    relative = np.where(not_zero, np.abs(differences) / np.where(not_zero, np.abs(values), 1.0), 0.0)

    def mean(terms: np.ndarray, count: np.ndarray) -> np.ndarray:
        sums, counts = terms.sum(axis=(0, 2)), count.sum(axis=(0, 2))
        sums, counts = np.append(sums, sums.sum()), np.append(counts, counts.sum())
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    return {
        "mae": mean(np.abs(differences), observed),
        "rmse": np.sqrt(mean(differences**2, observed)),
        "mape": mean(relative, not_zero),
    }
