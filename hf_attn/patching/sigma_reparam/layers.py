"""sigma-reparametrisation (arXiv 2303.06296) of the linear maps of any model, in place.

    W_hat = gamma * W / sigma(W),    y = x W_hat^T + bias

sigma(W) is the largest singular value, tracked by one step of power iteration in every forward; gamma is one learned
scalar, so that the spectral norm of each map is a parameter of its own.

The layers are real subclasses of `nn.Linear` and `nn.Conv2d`: `weight` stays a parameter of its usual name and
shape, which is what state dicts, FSDP, optimizers and adapters look for; `torch.nn.utils.parametrize` renames it, and
what is added to its `weight` (merging an adapter) is lost without a word. A layer changes its class in place, so that
hooks, tied weights and references stay. Whoever reads `weight` instead of calling the layer gets W, not W_hat: see
[`.bypass`].
"""

import weakref
from collections import deque
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization


EPS = 1e-12


@torch.no_grad()
def power_iteration(matrix: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of power iteration.

    Args:
        matrix: `(out, in)`.
        u: estimate of its leading right singular vector, `(in,)`.

    Returns:
        The estimate of the largest singular value, a scalar, and those of the leading left singular vector `(out,)` and
        of the right one `(in,)`.
    """
    left = F.normalize(matrix @ u, dim=0, eps=EPS)
    right = matrix.T @ left
    # left^T matrix right, since right is still to be divided by this
    sigma = torch.linalg.vector_norm(right)
    return sigma, left, right / sigma.clamp(min=EPS)


class _Reparametrise(torch.autograd.Function):
    """`gamma * W / sigma`; the gradient of sigma with respect to W is `left right^T`, the singular vectors held constant.

    Written out because autograd would make three more passes over matrices of the size of W.
    """

    @staticmethod
    def forward(weight, gamma, sigma, left, right, start):
        return weight * (gamma.to(sigma.dtype) / sigma).to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.start = inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight, gamma, sigma, left, right = ctx.saved_tensors
        ctx.start = None
        wide = sigma.dtype
        along = torch.dot(gradient.flatten().to(wide), weight.flatten().to(wide)) / sigma
        scale = gamma.to(wide) / sigma
        matrix = torch.addr(gradient.flatten(1).to(wide), left, right * -along).mul_(scale)
        return matrix.view_as(weight).to(weight.dtype), along.to(gamma.dtype).expand(1), None, None, None, None


class _LinearOfScaledInput(torch.autograd.Function):
    """`F.linear(x, W_hat, bias)` as `F.linear(gamma / sigma * x, W, bias)`, for an input smaller than W.

    W_hat is never made. Of W only the products and the rank-one part of its gradient remain; the gradient of gamma,
    `<dL/dW_hat, W> / sigma`, is `<dL/dy W, x> / sigma`.
    """

    @staticmethod
    def forward(input, weight, bias, gamma, sigma, left, right, start):
        rows = input.reshape(-1, weight.shape[1]) * (gamma.to(sigma.dtype) / sigma).to(input.dtype)
        # A view made here could not be modified in place, as `nn.ReLU(inplace=True)` does.
        return torch.ops.aten._unsafe_view(F.linear(rows, weight, bias), [*input.shape[:-1], weight.shape[0]])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.start = inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        input, weight, _, gamma, sigma, left, right = ctx.saved_tensors
        ctx.start = None
        wide = sigma.dtype
        scale = gamma.to(wide) / sigma
        rows, row_gradients = input.reshape(-1, weight.shape[1]), gradient.reshape(-1, weight.shape[0])
        back = row_gradients @ weight
        along = torch.dot(back.flatten().to(wide), rows.flatten().to(wide)) / sigma
        of_weight, of_bias = None, None
        if ctx.needs_input_grad[1]:
            of_weight = row_gradients.T @ (rows * scale.to(rows.dtype))
            of_weight = of_weight.to(wide).addr_(left, right * (-along * scale)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = row_gradients.sum(0)
        of_input = back.mul_(scale.to(back.dtype)).view_as(input)
        return of_input, of_weight, of_bias, along.to(gamma.dtype).expand(1), None, None, None, None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_plain_weight(weight: object) -> bool:
    """Whether a weight is one of torch's own tensors of floating point numbers, and not one of a quantiser."""
    is_foreign = type(weight).__module__.partition(".")[0] != "torch"
    return not isinstance(weight, torch.Tensor) or (weight.is_floating_point() and not is_foreign)


class _Start:
    """The u from which forward passes began that wait for their backward pass, whose graphs hold this."""

    def __init__(self, u: torch.Tensor):
        self.u = u


class _Starts:
    """From which u the forward passes of a layer began, for gradient checkpointing, which runs them again.

    Passes before the same backward pass begin from the same u, so that it does not matter which one is run again. Reentrant
    checkpointing runs them without gradients, unseen by any graph; those begin one after the other and are run again in
    reverse order.
    """

    def __init__(self):
        self.waiting: weakref.ref[_Start] | None = None
        self.without_graph: deque[torch.Tensor] = deque(maxlen=32)

    def first_run(self, u: torch.Tensor) -> _Start:
        """Begin a pass from u, or from where those began whose backward pass is still to come."""
        if not torch.is_grad_enabled():
            self.without_graph.append(u.clone())
            return _Start(u)
        start = self.waiting and self.waiting()
        if start is None:
            start = _Start(u.clone())
            self.waiting = weakref.ref(start)
        return start

    def second_run(self, u: torch.Tensor) -> _Start:
        """Begin a pass from where its first run began."""
        start = self.waiting and self.waiting()
        if start is not None:
            return start
        if self.without_graph:
            last = self.without_graph[-1]
            if len(self.without_graph) > 1:
                self.without_graph.pop()
            return _Start(last)
        return _Start(u)


class SigmaReparamLayer:
    """Base class of the reparametrised layers; mixed into a class that has `weight`.

    Attributes:
        gamma: learned scale `(1,)`; none with `stats_only`.
        u: estimate of the leading right singular vector, `(in,)`; of the left one, `(out,)`, with `track_left`. It is
            float32 unless the model is cast.
        stats_only: compute with the plain weight and only track its spectral norm.
        track_left: iterate on the transposed matrix, as the JAX code does; the same once u has converged.
    """

    weight: nn.Parameter
    gamma: nn.Parameter
    u: torch.Tensor
    stats_only: bool = False
    track_left: bool = False

    def __init__(self, *args, stats_only: bool = False, track_left: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._add_spectrum(stats_only, track_left)
        self.reset_spectrum("preserve")

    def _add_spectrum(self, stats_only: bool = False, track_left: bool = False) -> None:
        weight = self.weight
        self.stats_only, self.track_left = stats_only, track_left
        if not stats_only:
            self.gamma = nn.Parameter(torch.ones(1, dtype=weight.dtype, device=weight.device))
        size = weight.shape[0] if track_left else weight[0].numel()
        self.register_buffer("u", torch.zeros(size, dtype=torch.float32, device=weight.device))

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """The weight as the matrix of the iteration, in float32 at least; a convolution's is `(out, in * height * width)`."""
        matrix = self.weight.flatten(1).to(torch.promote_types(self.weight.dtype, torch.float32))
        return matrix.T if self.track_left else matrix

    @torch.no_grad()
    def reset_spectrum(self, init: str) -> None:
        """Set gamma and u from an exact singular value decomposition of the weight.

        Args:
            init: `"preserve"` starts at gamma = sigma(W), the plain layer; `"unit"` at gamma = 1.
        """
        _, singular_values, right = torch.linalg.svd(self.matrix(), full_matrices=False)
        initialization.copy_(self.u, right[0])
        if not self.stats_only:
            initialization.copy_(
                self.gamma, singular_values[:1] if init == "preserve" else torch.ones_like(singular_values[:1])
            )

    @torch.no_grad()
    def refresh_u(self) -> None:
        """Set u to the leading singular vector of the current weight; gamma is not changed."""
        right = torch.linalg.svd(self.matrix(), full_matrices=False).Vh
        self.u.copy_(right[0])

    def spectral_norm(self, u: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Estimate sigma(W) by one power iteration from u, which is not changed; see [`power_iteration`]."""
        u = self.u if u is None else u
        matrix = self.matrix()
        with torch.autocast(matrix.device.type, enabled=False):
            return power_iteration(matrix, u.to(matrix.dtype))

    def effective_weight(self) -> torch.Tensor:
        """`gamma * W / sigma(W)` in the shape and dtype of the weight; W itself with `stats_only`.

        In training mode u moves by the power iteration that this call makes; in eval mode it stays.
        """
        spectrum = self._next_spectrum()
        if self.stats_only:
            return self.weight
        # Exporters do not support custom autograd functions.
        reparametrise = _Reparametrise.forward if _is_exporting() else _Reparametrise.apply
        return reparametrise(self.weight, self.gamma, *spectrum)

    def _next_spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Start | None]:
        """sigma(W), the leading left `(out,)` and right `(in,)` singular vector, and where the iteration began.

        In training mode u moves, except in the second run of gradient checkpointing.
        """
        start, repeated = None, _in_backward()
        if self.training and not torch.compiler.is_compiling():
            starts = self.__dict__.setdefault("_starts", _Starts())
            start = starts.second_run(self.u) if repeated else starts.first_run(self.u)
        sigma, left, right = self.spectral_norm(None if start is None else start.u)
        if self.training and not repeated:
            self.u.copy_(right)
        return (sigma, right, left, start) if self.track_left else (sigma, left, right, start)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_starts"}

    def __setattr__(self, name: str, value) -> None:
        if name == "weight" and not is_plain_weight(value):
            raise ValueError(
                f"A sigma-reparametrised layer cannot be quantised (to {type(value).__name__}, {value.dtype}): its "
                "effective weight is not its weight parameter. Call fold_sigma_reparam first."
            )
        super().__setattr__(name, value)

    @contextmanager
    def plain_weight(self):
        """Context in which `weight` is W_hat; afterwards W is set so that W_hat equals the changed weight.

        For adding to the effective weight, as when an adapter is merged.
        """
        self.weight.data = self._frozen_effective_weight()
        try:
            yield
        finally:
            self.reset_spectrum("preserve")

    @torch.no_grad()
    def _frozen_effective_weight(self) -> torch.Tensor:
        training, self.training = self.training, False
        weight = self.effective_weight()
        self.training = training
        return weight


class SigmaReparamLinear(SigmaReparamLayer, nn.Linear):
    """`nn.Linear` with weight `gamma * W / sigma(W)`; extra parameter `gamma (1,)` and buffer `u (in,)`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Autocast reaches the operations of a model, but not those of a function with a backward pass of its own.
        autocast = torch.is_autocast_enabled(input.device.type)
        if self.stats_only or autocast or _is_exporting() or input.numel() >= self.weight.numel():
            return F.linear(input, self.effective_weight(), self.bias)
        return _LinearOfScaledInput.apply(input, self.weight, self.bias, self.gamma, *self._next_spectrum())


class SigmaReparamConv2d(SigmaReparamLayer, nn.Conv2d):
    """`nn.Conv2d` whose kernel, as the matrix `(out, in * height * width)`, is `gamma * W / sigma(W)`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


#: class of a plain layer -> class of the reparametrised one
REPARAMETRISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SigmaReparamLinear,
    nn.Conv2d: SigmaReparamConv2d,
}
_PLAIN = {reparametrised: plain for plain, reparametrised in REPARAMETRISED.items()}


def reparametrise_layer(module: nn.Module) -> None:
    """Convert a plain layer to a reparametrised one; gamma and u have to be set afterwards (see `reset_spectrum`)."""
    module.__class__ = REPARAMETRISED[type(module)]
    module._add_spectrum()


def make_plain(module: SigmaReparamLayer) -> None:
    """Make a reparametrised layer a plain one with the weight that it has, W."""
    if not module.stats_only:
        del module.gamma
    del module.u
    module.__dict__.pop("_starts", None)
    module.__dict__.pop("stats_only", None)
    module.__dict__.pop("track_left", None)
    module.__class__ = _PLAIN[type(module)]
