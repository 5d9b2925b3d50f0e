"""Scaling, shifting and turning the angles of complex numbers."""

import torch
from torch.autograd.function import once_differentiable


#: added to squared magnitudes
EPSILON = 1e-9


def _turn(states, delta, bias, positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rotated states, and the squared magnitude and angle of the original ones."""
    real, imaginary = states.chunk(2, dim=-1)
    square = torch.addcmul(real * real + EPSILON, imaginary, imaginary)
    magnitude, angle = square.sqrt(), torch.atan2(imaginary, real)
    turned = torch.addcmul(positions if bias is None else positions + bias, angle, delta)
    return torch.cat((magnitude * turned.cos(), magnitude * turned.sin()), dim=-1), square, angle


class _Turn(torch.autograd.Function):
    """Its backward is written out: left to autograd it is several times as many steps over all channels."""

    @staticmethod
    def forward(ctx, states, delta, bias, positions):
        output, square, angle = _turn(states, delta, bias, positions)
        ctx.save_for_backward(states, delta, square, angle, output)
        ctx.bias_shape = None if bias is None else bias.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, delta, square, angle, output = ctx.saved_tensors
        (real, imaginary), (first, second), (grad_first, grad_second) = (
            tensor.chunk(2, dim=-1) for tensor in (states, output, grad)
        )
        # With respect to the logarithm of the magnitude, and to the angle.
        radial = (grad_first * first + grad_second * second) / square
        turning = grad_second * first - grad_first * second
        around = turning * delta / square
        grad_states = torch.cat((radial * real - around * imaginary, radial * imaginary + around * real), dim=-1)
        grad_delta = (turning * angle).sum_to_size(delta.shape)
        grad_bias = None if ctx.bias_shape is None else turning.sum_to_size(ctx.bias_shape)
        return grad_states, grad_delta, grad_bias, None


def turn(
    states: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """Scale and shift the angles of complex numbers, and turn them by their positions.

    `|x| exp(i (delta * angle(x) + bias + positions))`, computed in float32 at least: angles grow with the position, and
    narrower types would round them. A zero has no gradient through its angle.

    Args:
        states: `(..., length, head_dim)`; real parts in the first half, imaginary ones in the second.
        delta: broadcast to `(..., length, head_dim / 2)`.
        bias: the same, or `None` for 0.
        positions: angles of the positions, the same.

    Returns:
        States of the same shape and dtype.
    """
    precision = torch.promote_types(states.dtype, torch.float32)
    delta, bias = (None if tensor is None else tensor.to(precision) for tensor in (delta, bias))
    arguments = (states.to(precision), delta, bias, positions.to(precision))
    output = _Turn.apply(*arguments) if torch.is_grad_enabled() else _turn(*arguments)[0]
    return output.to(states.dtype)
