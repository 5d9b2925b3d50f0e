"""How exact an implementation has to be: measured against its specification, not picked."""

import torch


def assert_as_exact(computed: torch.Tensor, specification: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """Check that an implementation errs at most twice as much as the specification in the same dtype, and one rounding.

    The error is that of the tensor as a whole, its root mean square: the largest of few entries is a matter of luck. An
    error in one place still shows, since no entry may be further off than four times the specification's worst.

    Args:
        computed: what the implementation computes.
        specification: what the eager path computes from the same inputs in the same dtype.
        exact: the eager path in float64, from the same inputs.
        what: name for the error message.
    """
    assert computed.dtype == specification.dtype, f"{what}: {computed.dtype} instead of {specification.dtype}"
    assert computed.shape == exact.shape, f"{what}: shape {tuple(computed.shape)} instead of {tuple(exact.shape)}"
    unit = torch.finfo(specification.dtype).eps / 2
    errors = {"computed": computed.double() - exact, "specification": specification.double() - exact}
    for factor, norm, name in ((2, _root_mean_square, "error"), (4, _largest, "largest error")):
        error, allowed = norm(errors["computed"]), factor * norm(errors["specification"]) + unit * norm(exact)
        assert error <= allowed, (
            f"{what}: {name} {error:.3g} where {allowed:.3g} is allowed (values: {norm(exact):.3g})"
        )


def _root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()
