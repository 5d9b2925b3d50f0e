"""Building blocks of GMAN: linear layers with batch normalisation, in pairs, and the gate of two branches."""

from collections.abc import Sequence

import torch
from torch import nn

from .configuration_gman import GMANConfig


class GMANBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis over all others; the running variance is that of the batch, without Bessel's correction.

    TensorFlow keeps the biased variance, PyTorch the unbiased one.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., channels)` -> the same shape."""
        rows = hidden_states.reshape(-1, self.num_features)
        if not self.training:
            return super().forward(rows).view_as(hidden_states)
        # A copy, because the tensor that autograd saves must not change.
        variance = self.running_var.clone()
        normalised = nn.functional.batch_norm(
            rows,
            self.running_mean,
            variance,
            self.weight,
            self.bias,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # `variance` holds the unbiased one of the batch, which is too large by n / (n - 1).
            shrinkage = (rows.shape[0] - 1) / rows.shape[0]
            self.running_var.mul_((1 - self.momentum) * (1 - shrinkage)).add_(variance, alpha=shrinkage)
        return normalised.view_as(hidden_states)


def batch_norm(config: GMANConfig, channels: int, activated: bool = True) -> nn.Module:
    """Normalisation after a linear layer; layers without an activation have none, except in the PyTorch ports."""
    if not (activated or config.batch_norm_everywhere):
        return nn.Identity()
    return GMANBatchNorm(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


def normalised_maps(
    hidden_states: torch.Tensor, linears: Sequence[nn.Module], norms: Sequence[nn.Module], activated: bool = False
) -> tuple[torch.Tensor, ...]:
    """`norm(linear(hidden_states))` of each pair, if `activated` with a ReLU.

    In eval mode batch normalisation is an affine map, so that each pair is one linear map, and all pairs together are one.
    Adapters, quantisers, hooks and offloading work through the call of a layer, which they keep.
    """
    pairs = tuple(zip(linears, norms, strict=True))
    if not all(_is_affine(linear, norm) for linear, norm in pairs):
        outputs = (norm(linear(hidden_states)) for linear, norm in pairs)
        return tuple(output.relu_() if activated else output for output in outputs)
    weights, biases = zip(*(_folded(linear, norm) for linear, norm in pairs), strict=True)
    together = nn.functional.linear(hidden_states, torch.cat(weights), torch.cat(biases))
    if activated:
        together = together.relu_()
    return together.split([len(weight) for weight in weights], dim=-1)


def _is_affine(linear: nn.Module, norm: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and type(norm) is GMANBatchNorm
        and not norm.training
        and not any(
            module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
            for module in (linear, norm)
        )
    )


def _folded(linear: nn.Linear, norm: GMANBatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of `norm(linear(x))`, multiplied in at least float32."""
    dtype = linear.weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    factor = norm.weight.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
    bias = -norm.running_mean.to(exact)
    if linear.bias is not None:
        bias = bias + linear.bias
    bias = torch.addcmul(norm.bias.to(exact), bias, factor)
    return (linear.weight * factor[:, None]).to(dtype), bias.to(dtype)


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set the share of a batch in the running statistics of all batch normalisations of a GMAN."""
    for module in model.modules():
        if isinstance(module, GMANBatchNorm):
            module.momentum = momentum


class GMANMLP(nn.Module):
    """`W2 ReLU(BN(W1 x + b1)) + b2`.

    Args:
        config: the configuration.
        in_features: width of the input.
        out_features: width of the output.
        num_layers: 1 for only the first layer.
        dropout: probability of dropping an input of each layer.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        config: GMANConfig,
        in_features: int,
        out_features: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(in_features, config.hidden_size, bias=bias)
        self.norm1 = batch_norm(config, config.hidden_size)
        if num_layers == 2:
            self.fc2 = nn.Linear(config.hidden_size, out_features, bias=bias)
            self.norm2 = batch_norm(config, out_features, activated=False)
        else:
            self.fc2 = self.norm2 = nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = normalised_maps(self.dropout(hidden_states), [self.fc1], [self.norm1], activated=True)
        if isinstance(self.fc2, nn.Identity):
            return hidden_states
        return normalised_maps(self.dropout(hidden_states), [self.fc2], [self.norm2])[0]


class GMANEmbeddings(nn.Module):
    """Spatio-temporal embedding: a vector for each sensor plus a vector for each time step (section "Spatio-Temporal Embedding")."""

    def __init__(self, config: GMANConfig):
        super().__init__()
        self.steps_per_day = config.steps_per_day
        self.wrap = config.wrap_time_features
        self.register_buffer("spatial_embedding", torch.zeros(config.num_nodes, config.spatial_embedding_dim))
        width, bias = config.hidden_size, config.embedding_bias
        self.spatial = GMANMLP(config, config.spatial_embedding_dim, width, bias=bias)
        self.temporal = GMANMLP(config, 7 + config.steps_per_day, width, bias=bias)

    def forward(self, time_features: torch.Tensor) -> torch.Tensor:
        """Day of week and slot of day, `(batch, steps, 2)` -> `(batch, steps, nodes, hidden_size)`."""
        of_time = torch.cat(
            [self._one_hot(time_features[..., 0], 7), self._one_hot(time_features[..., 1], self.steps_per_day)], dim=-1
        )
        of_time = self.temporal(of_time.to(self.spatial_embedding.dtype))
        return self.spatial(self.spatial_embedding) + of_time[:, :, None]

    def _one_hot(self, index: torch.Tensor, size: int) -> torch.Tensor:
        if self.wrap:
            index = index % size
        # An index out of range is equal to none, which gives zeros.
        return index[..., None] == torch.arange(size, device=index.device)


class GMANGatedFusion(nn.Module):
    """Mixes the branches with a gate: `z = sigmoid(S W1 + T W2 + b)`, then `MLP(z S + (1 - z) T)` (equation 11)."""

    def __init__(self, config: GMANConfig):
        super().__init__()
        width = config.hidden_size
        self.spatial_proj = nn.Linear(width, width, bias=False)
        self.spatial_norm = batch_norm(config, width, activated=False)
        self.temporal_proj = nn.Linear(width, width)
        self.temporal_norm = batch_norm(config, width, activated=False)
        self.gate = nn.Sigmoid()
        self.output = GMANMLP(config, width, width)

    def forward(self, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
        (of_spatial,) = normalised_maps(spatial, [self.spatial_proj], [self.spatial_norm])
        (of_temporal,) = normalised_maps(temporal, [self.temporal_proj], [self.temporal_norm])
        gate = self.gate(of_spatial + of_temporal)
        return self.output(torch.lerp(temporal, spatial, gate))
