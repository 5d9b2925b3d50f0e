"""sigma-reparametrisation (arXiv 2303.06296) of the linear maps of any model, in place.

    W_hat = gamma * W / sigma(W),    y = x W_hat^T + bias

sigma(W) is the largest singular value, tracked by one step of power iteration in every forward; gamma is one learned
scalar, so that the spectral norm of each map is a parameter of its own.

The layers are real subclasses of ``nn.Linear`` and ``nn.Conv2d``: ``weight`` stays a parameter of its usual name and
shape, which is what state dicts, FSDP, optimizers and adapters look for; ``torch.nn.utils.parametrize`` renames it, and
what is added to its ``weight`` (merging an adapter) is lost without a word. A layer changes its class in place, so that
hooks, tied weights and references stay.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization

from ..._import_hooks import when_imported


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
    def forward(weight, gamma, sigma, left, right):
        return weight * (gamma.to(sigma.dtype) / sigma).to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight, gamma, sigma, left, right = ctx.saved_tensors
        wide = sigma.dtype
        along = torch.dot(gradient.flatten().to(wide), weight.flatten().to(wide)) / sigma
        scale = gamma.to(wide) / sigma
        matrix = torch.addr(gradient.flatten(1).to(wide), left, right * -along).mul_(scale)
        return matrix.view_as(weight).to(weight.dtype), along.to(gamma.dtype).expand(1), None, None, None


class _LinearOfScaledInput(torch.autograd.Function):
    """`F.linear(x, W_hat, bias)` as `F.linear(gamma / sigma * x, W, bias)`, for an input smaller than W.

    W_hat is never made. Of W only the products and the rank-one part of its gradient remain; the gradient of gamma,
    `<dL/dW_hat, W> / sigma`, is `<dL/dy W, x> / sigma`.
    """

    @staticmethod
    def forward(input, weight, bias, gamma, sigma, left, right):
        return F.linear(input * (gamma.to(sigma.dtype) / sigma).to(input.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        input, weight, _, gamma, sigma, left, right = ctx.saved_tensors
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
        return of_input, of_weight, of_bias, along.to(gamma.dtype).expand(1), None, None, None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class SigmaReparamLayer:
    """What the reparametrised layers share; mixed into a class that has ``weight``.

    Attributes:
        gamma: learned scale `(1,)`; none with ``stats_only``.
        u: estimate of the leading right singular vector, `(in,)`; of the left one, `(out,)`, with ``track_left``. It is
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

    def spectral_norm(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Estimate sigma(W) by one power iteration from u, which stays; see :func:`power_iteration`."""
        u = self.u
        if self.training and _in_backward():
            # Gradient checkpointing runs the forward again: it has to start from where the first one did.
            u = getattr(self, "_u_before", u)
        matrix = self.matrix()
        with torch.autocast(matrix.device.type, enabled=False):
            return power_iteration(matrix, u.to(matrix.dtype))

    def effective_weight(self) -> torch.Tensor:
        """`gamma * W / sigma(W)` in the shape and dtype of the weight; W itself with ``stats_only``.

        In training mode u moves by the power iteration that this call makes; in eval mode it stays.
        """
        spectrum = self._next_spectrum()
        return self.weight if self.stats_only else _Reparametrise.apply(self.weight, self.gamma, *spectrum)

    def _next_spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sigma(W) and the leading left `(out,)` and right `(in,)` singular vector; moves u in training mode."""
        sigma, left, right = self.spectral_norm()
        if self.training and not _in_backward():
            self._u_before = self.u.clone()
            self.u.copy_(right)
        return (sigma, right, left) if self.track_left else (sigma, left, right)

    @contextmanager
    def plain_weight(self):
        """Let ``weight`` be W_hat for a while; what it has become afterwards is W_hat again, exactly.

        For adding to the effective weight, as when an adapter is merged.
        """
        self.weight.data = self._frozen_effective_weight()
        yield
        self.reset_spectrum("preserve")

    @torch.no_grad()
    def _frozen_effective_weight(self) -> torch.Tensor:
        training, self.training = self.training, False
        weight = self.effective_weight()
        self.training = training
        return weight


class SigmaReparamLinear(SigmaReparamLayer, nn.Linear):
    """`nn.Linear` with weight `gamma * W / sigma(W)`; extra parameter ``gamma (1,)`` and buffer ``u (in,)``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Autocast reaches the operations of a model, but not those of a function with a backward pass of its own.
        autocast = torch.is_autocast_enabled(input.device.type)
        if self.stats_only or autocast or input.numel() >= self.weight.numel():
            return F.linear(input, self.effective_weight(), self.bias)
        return _LinearOfScaledInput.apply(input, self.weight, self.bias, self.gamma, *self._next_spectrum())


class SigmaReparamConv2d(SigmaReparamLayer, nn.Conv2d):
    """`nn.Conv2d` whose kernel, as the matrix `(out, in * height * width)`, is `gamma * W / sigma(W)`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


_REPARAMETRISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SigmaReparamLinear,
    nn.Conv2d: SigmaReparamConv2d,
}
_PLAIN = {reparametrised: plain for plain, reparametrised in _REPARAMETRISED.items()}


@dataclass(frozen=True)
class SigmaReparamReport:
    """What :func:`apply_sigma_reparam` did.

    Attributes:
        converted: names of the layers that were reparametrised.
        skipped: name of a linear layer that was left alone -> reason.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]


def apply_sigma_reparam(
    model: nn.Module,
    init: str = "preserve",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
) -> SigmaReparamReport:
    """Reparametrise every linear layer and 2-D convolution of a model, in place.

    `save_pretrained` and `from_pretrained` of transformers keep the result. Libraries that rebuild a model without
    transformers (timm, diffusers) need this call before the weights are loaded, or a folded model.

    Args:
        model: any model of transformers, timm, diffusers or plain torch.
        init: `"preserve"` keeps the function (gamma = sigma(W)); `"unit"` starts every map at spectral norm 1, for
            training from scratch.
        include: patterns (as of `fnmatch`) of the names of layers to convert.
        exclude: patterns of names to leave alone.

    Returns:
        Which layers were converted and which were not, with the reasons. Layers whose weight is shared with an embedding
        are left alone, as are subclasses that do not compute a plain linear map.

    Raises:
        ValueError: for an unknown ``init``; if the model is reparametrised already or quantised; if no layer is left to
            convert; or if a weight is all zero, which has no spectral norm.
    """
    if init not in ("preserve", "unit"):
        raise ValueError(f"init must be 'preserve' or 'unit', got {init!r}.")
    include, exclude = tuple(include), tuple(exclude)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SigmaReparamLayer):
            raise ValueError(f"{name or 'The module'} is reparametrised already. Call fold_sigma_reparam first.")
        if not isinstance(module, tuple(_REPARAMETRISED)):
            continue
        if not module.weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({module.weight.dtype}); reparametrise the model before it is quantised, and fold it."
            )
        if not any(fnmatch(name, pattern) for pattern in include):
            skipped[name] = "not included"
        elif any(fnmatch(name, pattern) for pattern in exclude):
            skipped[name] = "excluded"
        elif type(module) not in _REPARAMETRISED:
            skipped[name] = f"is a {type(module).__name__}"
        elif id(module.weight) in embeddings:
            skipped[name] = "shares its weight with an embedding"
        else:
            chosen[name] = module
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or nn.Conv2d to reparametrise"
            + (f" ({len(skipped)} were skipped: {_first(skipped)})." if skipped else ".")
        )
    zero = [name for name, module in chosen.items() if not module.weight.any()]
    if zero:
        raise ValueError(
            f"The weights of {_first(zero)} are all zero and have no spectral norm. Name them in `exclude`, or apply the "
            "reparametrisation before they are set to zero."
        )
    for module in chosen.values():
        reparametrise_layer(module)
        module.reset_spectrum(init)
    _note_in_config(model, list(chosen))
    return SigmaReparamReport(tuple(chosen), skipped)


def _note_in_config(model: nn.Module, layers: list[str] | None) -> None:
    """Record the converted layers where `from_pretrained` finds them, or remove the record."""
    if not hasattr(model, "config_class"):
        return
    if layers is None:
        model.config.__dict__.pop("quantization_config", None)
        if hasattr(model.config, "reparametrised"):  # a family that builds its layers itself
            model.config.reparametrised = False
        return
    from .loading import SigmaReparamLoading

    model.config.quantization_config = SigmaReparamLoading(layers)


def reparametrise_layer(module: nn.Module) -> None:
    """Make one plain layer a reparametrised one; its gamma and u are still to be set (see `reset_spectrum`)."""
    module.__class__ = _REPARAMETRISED[type(module)]
    module._add_spectrum()


def fold_sigma_reparam(model: nn.Module) -> tuple[str, ...]:
    """Turn every reparametrised layer into a plain one with weight W_hat, in place, with equal outputs in eval mode.

    Fold before quantising or exporting, and for inference at no extra cost.

    Returns:
        Names of the folded layers.

    Raises:
        ValueError: if no layer is reparametrised, as when a model is folded twice.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SigmaReparamLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no reparametrised layer: nothing to fold.")
    for module in layers.values():
        module.weight.data = module._frozen_effective_weight()
        if not module.stats_only:
            del module.gamma
        del module.u
        module.__dict__.pop("_u_before", None)
        module.__class__ = _PLAIN[type(module)]
    _note_in_config(model, None)
    return tuple(layers)


def _first(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _make_lora_merge_effective_weights(peft_lora) -> None:
    """Let PEFT's LoRA layers merge into W_hat: they know a reparametrised layer as an `nn.Linear` and add to W."""

    def around_plain_weight(method):
        def wrapper(self, *args, **kwargs):
            base_layer = self.get_base_layer()
            if not isinstance(base_layer, SigmaReparamLayer):
                return method(self, *args, **kwargs)
            with base_layer.plain_weight():
                return method(self, *args, **kwargs)

        wrapper.__doc__, wrapper.__name__ = method.__doc__, method.__name__
        return wrapper

    for name in ("Linear", "Conv2d"):
        for cls in getattr(peft_lora, name).__mro__:
            for method in ("merge", "unmerge"):
                if method in vars(cls) and cls.__module__ == peft_lora.__name__:
                    setattr(cls, method, around_plain_weight(vars(cls)[method]))


when_imported("peft.tuners.lora.layer", _make_lora_merge_effective_weights)
