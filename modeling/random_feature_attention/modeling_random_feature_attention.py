# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""One attention layer with frozen random query-key matrices and trained values (arXiv 2307.11353), and its counterpart."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from hf_attn.hub import HubModelMixin

from .configuration_random_feature_attention import RandomFeatureAttentionConfig, RandomFeatureMLPConfig
from .features import attention_features, mlp_features
from .ridge import check_penalty, ridge_values


class RandomFeaturePreTrainedModel(HubModelMixin, PreTrainedModel):
    """A regression model that is linear in its trained values.

    Attributes:
        frozen_name: name of the buffer with the random weights.
        value_name: name of the trained parameter.
    """

    main_input_name = "inputs_embeds"
    # The loss is a plain mean, which Trainer has to divide by the steps of an accumulation.
    accepts_loss_kwargs = False
    frozen_name: str
    value_name: str

    def draw(self) -> torch.Tensor:
        """The random weights of the configuration's seed, in float64."""
        raise NotImplementedError

    def compute_features(self, inputs_embeds: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """Features of inputs for random weights."""
        raise NotImplementedError

    def _normal(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * self.config.weight_std

    def _register_frozen(self, *shape: int) -> None:
        frozen = torch.empty(*shape)
        self.register_buffer(self.frozen_name, frozen)
        if not frozen.is_meta:
            frozen.copy_(self.draw())

    def _init_weights(self, module: nn.Module):
        if module is self:
            frozen = getattr(self, self.frozen_name)
            init.copy_(frozen, self.draw().to(frozen))
            init.zeros_(getattr(self, self.value_name))

    @property
    def values(self) -> nn.Parameter:
        """The trained values."""
        return getattr(self, self.value_name)

    def features(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Features, which are multiplied by the values.

        Args:
            inputs_embeds: `(batch, 1 + num_keys, input_dim)`, the query first; tokens are meant to have norm 1.

        Returns:
            `(batch, trained values)`.

        Raises:
            ValueError: for inputs of another shape.
        """
        wanted = (1 + self.config.num_keys, self.config.input_dim)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[1:] != wanted:
            raise ValueError(
                f"inputs_embeds must have the shape (batch, {wanted[0]}, {wanted[1]}), for the query and "
                f"{self.config.num_keys} keys; got {tuple(inputs_embeds.shape)}."
            )
        return self.compute_features(inputs_embeds, getattr(self, self.frozen_name).to(inputs_embeds.dtype))

    @can_return_tuple
    def forward(
        self,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Predict one number for each sequence.

        Args:
            inputs_embeds: `(batch, 1 + num_keys, input_dim)`, the query first.
            labels: `(batch,)`; gives the mean squared error as the loss.

        Returns:
            `logits` `(batch,)`, and the loss.
        """
        if inputs_embeds is None:
            raise ValueError("inputs_embeds of shape (batch, 1 + num_keys, input_dim) is required.")
        logits = self.features(inputs_embeds.to(self.dtype)) @ self.values.flatten()
        loss = None
        if labels is not None:
            if labels.numel() != len(logits):
                raise ValueError(
                    f"labels must have the shape ({len(logits)},), one number per sequence; got {tuple(labels.shape)}."
                )
            loss = nn.functional.mse_loss(logits, labels.to(logits).flatten())
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def fit_ridge(
        self,
        inputs_embeds: torch.Tensor,
        labels: torch.Tensor,
        penalty: float,
        solver: str = "auto",
    ) -> "RandomFeaturePreTrainedModel":
        """Set the values to those that minimise `(1/n) sum (y - f)^2 + penalty |V|^2`.

        Features and solution are computed in float64, independent of the dtype of the model; the values are stored in that dtype.

        Args:
            inputs_embeds: `(n, 1 + num_keys, input_dim)`.
            labels: `(n,)`.
            penalty: lambda, at least 0.
            solver: `"primal"`, `"dual"`, or `"auto"` for the smaller problem; see [`ridge_values`].

        Returns:
            The model.

        Raises:
            ValueError: for a negative penalty, no samples, inputs of another shape, or NaN.
        """
        check_penalty(penalty)
        if labels.shape != (len(inputs_embeds),):
            raise ValueError(
                f"labels must have the shape ({len(inputs_embeds)},), one number per sequence; got "
                f"{tuple(labels.shape)}."
            )
        features = self.features(inputs_embeds.to(self.device, torch.float64))
        values = ridge_values(features, labels, penalty, solver)
        self.values.copy_(values.view_as(self.values))
        return self


class RandomFeatureAttentionModel(RandomFeaturePreTrainedModel):
    r"""Random-feature attention: `f(x) = sum_m (1/N) sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>` with `x~ = [x; 1]`.

    `qk_weight` `(heads, d + 1, d + 1)` holds the random matrices, with their mean if there is one; it is a buffer, which is saved
    and never trained. `value_weight` `(heads, d + 1)` is trained.
    """

    config: RandomFeatureAttentionConfig
    frozen_name, value_name = "qk_weight", "value_weight"
    compute_features = staticmethod(attention_features)

    def __init__(self, config: RandomFeatureAttentionConfig):
        super().__init__(config)
        width = config.input_dim + 1
        self._register_frozen(config.num_heads, width, width)
        self.value_weight = nn.Parameter(torch.zeros(config.num_heads, width))
        self.post_init()

    def draw(self) -> torch.Tensor:
        width = self.config.input_dim + 1
        weight = self._normal(self.config.num_heads, width, width)
        if self.config.biased:
            weight.diagonal(dim1=1, dim2=2)[:, :-1] += 1
        return weight


class RandomFeatureMLPModel(RandomFeaturePreTrainedModel):
    r"""Two layers with random features: `f(x) = sum_j relu(<w_j, [x_0; ...; x_N; 1]>) v_j`.

    `mlp_weight` `(units, (N + 1) d + 1)` is a buffer, `mlp_value` `(units,)` is trained. Unlike attention it depends on the order of the
    keys.
    """

    config: RandomFeatureMLPConfig
    frozen_name, value_name = "mlp_weight", "mlp_value"
    compute_features = staticmethod(mlp_features)

    def __init__(self, config: RandomFeatureMLPConfig):
        super().__init__(config)
        width = (config.num_keys + 1) * config.input_dim + 1
        self._register_frozen(config.num_units, width)
        self.mlp_value = nn.Parameter(torch.zeros(config.num_units))
        self.post_init()

    def draw(self) -> torch.Tensor:
        return self._normal(*self.mlp_weight.shape)


__all__ = ["RandomFeatureAttentionModel", "RandomFeatureMLPModel", "RandomFeaturePreTrainedModel"]
