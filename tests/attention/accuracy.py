"""How exact an implementation has to be: measured against its specification, not picked."""

import torch


def assert_as_exact(computed: torch.Tensor, specification: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """Check that an implementation errs at most twice as much as the specification in the same dtype, and one rounding.

    Args:
        computed: what the implementation computes.
        specification: what the eager path computes from the same inputs in the same dtype.
        exact: the eager path in float64, from the same inputs.
        what: name for the error message.
    """
    assert computed.dtype == specification.dtype, f"{what}: {computed.dtype} instead of {specification.dtype}"
    assert computed.shape == exact.shape, f"{what}: shape {tuple(computed.shape)} instead of {tuple(exact.shape)}"
    rounding = torch.finfo(specification.dtype).eps / 2 * exact.abs().max()
    error, allowed = ((tensor - exact).abs().max() for tensor in (computed.double(), specification.double()))
    allowed = 2 * allowed + rounding
    assert error <= allowed, (
        f"{what}: error {error:.3g} where {allowed:.3g} is allowed (largest value {exact.abs().max():.3g})"
    )
