# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""GMAN: forecasts for all sensors of a road network by attention over sensors and over time (arXiv 1911.08415)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SampleTSPredictionOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from hf_attn.architectures.layers import eager_attention_forward
from hf_attn.hub import HubModelMixin

from .configuration_gman import GMANConfig
from .layers import GMANMLP, GMANEmbeddings, GMANGatedFusion, batch_norm, normalised_maps
from .metrics import masked_mae, observed_values


@dataclass
class GMANModelOutput(ModelOutput):
    """Output of [`GMANModel`].

    Args:
        last_hidden_state: `(batch, prediction_length, num_nodes, hidden_size)`, output of the decoder.
        hidden_states: with `output_hidden_states`, `2 * num_hidden_layers + 2` tensors `(batch, steps, num_nodes,
            hidden_size)`: the embedded history, the output of each encoder block, that of the transform attention, and of
            each decoder block.
        spatial_attentions: with `output_attentions`, for each block of encoder and decoder `(batch, heads, steps, num_nodes,
            num_nodes)`, or `(batch, heads, steps, groups, group_size, group_size)` within the groups of the group attention.
        temporal_attentions: with `output_attentions`, for each block `(batch, heads, num_nodes, steps, steps)`.
        transform_attentions: with `output_attentions`, one `(batch, heads, num_nodes, prediction_length, context_length)`.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    spatial_attentions: tuple[torch.Tensor, ...] | None = None
    temporal_attentions: tuple[torch.Tensor, ...] | None = None
    transform_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class GMANPredictionOutput(ModelOutput):
    """Output of [`GMANForPrediction`].

    Args:
        loss: masked mean absolute error in real units, with `future_values` or `labels`.
        prediction_outputs: `(batch, prediction_length, num_nodes)` in real units.
        loc: `(batch, 1, 1)`, mean that was subtracted from the history (`config.value_mean`).
        scale: `(batch, 1, 1)`, standard deviation that it was divided by (`config.value_std`).
        hidden_states: see [`GMANModelOutput`].
        spatial_attentions: see [`GMANModelOutput`].
        temporal_attentions: see [`GMANModelOutput`].
        transform_attentions: see [`GMANModelOutput`].
    """

    loss: torch.Tensor | None = None
    prediction_outputs: torch.Tensor | None = None
    loc: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    spatial_attentions: tuple[torch.Tensor, ...] | None = None
    temporal_attentions: tuple[torch.Tensor, ...] | None = None
    transform_attentions: tuple[torch.Tensor, ...] | None = None


#: on a CPU `sdpa` is faster with heads that fill its vectors, if there are enough keys to make up for the copies
_SDPA_CPU_HEAD_DIM = 16
_SDPA_CPU_MIN_KEYS = 64


class GMANAttention(nn.Module):
    """Multi-head softmax attention whose queries, keys and values each pass batch normalisation and a ReLU.

    Args:
        config: the configuration.
        in_features: width of what queries, keys and values are made of.
        is_causal: a query attends to the keys up to its own position only.
    """

    def __init__(self, config: GMANConfig, in_features: int, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        scaling = config.attention_scaling
        self.scaling = config.head_dim**-0.5 if scaling is None else float(scaling)
        width = config.hidden_size
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", nn.Linear(in_features, width))
            setattr(self, f"{name}_norm", batch_norm(config, width))
        self.output = GMANMLP(config, width, width, num_layers=config.attention_output_layers)

    def project(
        self, query_states: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(..., hidden_size)`, the heads side by side."""
        linears, norms = (self.q_proj, self.k_proj, self.v_proj), (self.q_norm, self.k_norm, self.v_norm)
        if query_states is key_states is value_states:
            return normalised_maps(query_states, linears, norms, activated=True)
        each = zip((query_states, key_states, value_states), linears, norms, strict=True)
        return tuple(normalised_maps(states, [linear], [norm], activated=True)[0] for states, linear, norm in each)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_attentions: bool = False,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend along the second axis.

        Args:
            query: `(batch, q_len, heads, head_dim)`; here "heads" may count sensors too.
            key: `(batch, kv_len, heads, head_dim)`.
            value: `(batch, kv_len, heads, head_dim)`.
            output_attentions: compute the weights as a tensor, in any implementation.
            attention_mask: `(1 or batch, 1, 1 or q_len, kv_len)`, true where a query may attend to a key.

        Returns:
            `(batch, q_len, heads, head_dim)`, and weights `(batch, heads, q_len, kv_len)` on request.
        """
        implementation = self.config._attn_implementation
        # Neither weights nor empty batches are for `sdpa`.
        if output_attentions or query.shape[0] == 0:
            implementation = "eager"
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if implementation == "eager":
            mask = self._additive_mask(query, key, attention_mask)
            output, weights = eager_attention_forward(self, query, key, value, mask, scaling=self.scaling)
            return output, weights if output_attentions else None
        padding = _SDPA_CPU_HEAD_DIM - self.head_dim
        pad = padding > 0 and implementation == "sdpa" and query.device.type == "cpu"
        if pad := pad and key.shape[2] >= _SDPA_CPU_MIN_KEYS:
            # Zeros change no product; the scale stays that of the true width.
            query, key, value = (nn.functional.pad(states, (0, padding)) for states in (query, key, value))
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling)
        return (output[..., : self.head_dim] if pad else output), None

    def _additive_mask(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        seen = attention_mask
        if self.is_causal:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if seen is None:
            return None
        return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(query.dtype).min
        )

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` -> `(..., heads, head_dim)`; a head is a block of neighbouring channels."""
        return states.unflatten(-1, (-1, self.head_dim))

    def attend_over_time(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend along the steps, for each sensor by itself.

        Args:
            query: `(batch, q_len, nodes, hidden_size)`.
            key: `(batch, kv_len, nodes, hidden_size)`.
            value: `(batch, kv_len, nodes, hidden_size)`.
            output_attentions: whether to return the weights.

        Returns:
            `(batch, q_len, nodes, hidden_size)` and `(batch, heads, nodes, q_len, kv_len)`.
        """
        # Sensors are so many more heads: nothing is transposed in memory.
        heads = (states.flatten(2).unflatten(2, (-1, self.head_dim)) for states in (query, key, value))
        output, weights = self.attend(*heads, output_attentions)
        if weights is not None:
            weights = weights.unflatten(1, (query.shape[2], -1)).transpose(1, 2)
        return output.reshape(query.shape), weights


class GMANSpatialAttention(GMANAttention):
    """Attention of all sensors to all sensors, in each time step (equations 5 to 7)."""

    def __init__(self, config: GMANConfig):
        super().__init__(config, 2 * config.hidden_size)

    def forward(
        self, states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, steps, nodes, 2 * hidden_size)` -> `(batch, steps, nodes, hidden_size)`, weights."""
        batch_size, steps = states.shape[:2]
        heads = (self.split_heads(projected).flatten(0, 1) for projected in self.project(states, states, states))
        output, weights = self.attend(*heads, output_attentions)
        if weights is not None:
            weights = weights.unflatten(0, (batch_size, steps)).transpose(1, 2)
        return self.output(output.flatten(2).unflatten(0, (batch_size, steps))), weights


class GMANGroupSpatialAttention(GMANAttention):
    """Attention of sensors within random groups, plus attention of the groups to each other (section "Group Spatial Attention").

    Scores per step and head fall from `N^2` to `N * M + (N / M)^2` with groups of `M` sensors. The paper leaves open how the
    second attention is made; here it has weights of its own and no spatio-temporal embedding, and takes the maximum over
    each group.
    """

    def __init__(self, config: GMANConfig):
        super().__init__(config, 2 * config.hidden_size)
        self.group_size = config.group_size
        self.num_groups = -(-config.num_nodes // config.group_size)
        width = config.hidden_size
        for name in ("q", "k", "v"):
            setattr(self, f"group_{name}_proj", nn.Linear(width, width))
            setattr(self, f"group_{name}_norm", batch_norm(config, width))
        self.register_buffer("node_permutation", torch.arange(config.num_nodes))

    def forward(
        self, states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, steps, nodes, 2 * hidden_size)` -> `(batch, steps, nodes, hidden_size)`, weights within the groups."""
        batch_size, steps, num_nodes = states.shape[:3]
        groups = (batch_size, steps, self.num_groups)
        slots = self.num_groups * self.group_size
        is_sensor = (torch.arange(slots, device=states.device) < num_nodes).unflatten(0, (-1, self.group_size))

        heads = (
            self.split_heads(self._to_groups(projected)).flatten(0, 2)
            for projected in self.project(states, states, states)
        )
        mask = None
        if slots > num_nodes:
            mask = is_sensor.expand(batch_size * steps, -1, -1).flatten(0, 1)[:, None, None]
        local, weights = self.attend(*heads, output_attentions, mask)
        local = local.flatten(2).unflatten(0, groups)
        if weights is not None:
            weights = weights.unflatten(0, groups).permute(0, 3, 1, 2, 4, 5)

        pooled = local.masked_fill(~is_sensor[..., None], -torch.inf).amax(dim=3)
        heads = (
            self.split_heads(norm(projection(pooled)).relu_()).flatten(0, 1)
            for projection, norm in (
                (self.group_q_proj, self.group_q_norm),
                (self.group_k_proj, self.group_k_norm),
                (self.group_v_proj, self.group_v_norm),
            )
        )
        between, _ = self.attend(*heads)
        between = between.flatten(2).unflatten(0, groups[:2])
        summed = (local + between[:, :, :, None]).flatten(2, 3)[:, :, :num_nodes]
        return self.output(summed[:, :, self.node_permutation.argsort()]), weights

    def _to_groups(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, steps, nodes, channels)` -> `(batch, steps, groups, group_size, channels)`, zeros in the last group."""
        states = states[:, :, self.node_permutation]
        missing = self.num_groups * self.group_size - states.shape[2]
        return nn.functional.pad(states, (0, 0, 0, missing)).unflatten(2, (-1, self.group_size))


class GMANTemporalAttention(GMANAttention):
    """Attention of all steps to all steps, or to earlier ones, for each sensor (equations 8 to 10)."""

    def __init__(self, config: GMANConfig):
        super().__init__(config, 2 * config.hidden_size, is_causal=config.causal)

    def forward(
        self, states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, steps, nodes, 2 * hidden_size)` -> `(batch, steps, nodes, hidden_size)`, weights."""
        output, weights = self.attend_over_time(*self.project(states, states, states), output_attentions)
        return self.output(output), weights


class GMANTransformAttention(GMANAttention):
    """Transforms the encoded history to states of the future steps: their embeddings attend to those of the history (equations 12, 13)."""

    def __init__(self, config: GMANConfig):
        super().__init__(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_embeddings: torch.Tensor,
        future_embeddings: torch.Tensor,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, context_length, nodes, hidden_size)` -> `(batch, prediction_length, nodes, hidden_size)`, weights."""
        projected = self.project(future_embeddings, past_embeddings, hidden_states)
        output, weights = self.attend_over_time(*projected, output_attentions)
        return self.output(output), weights


class GMANBlock(GradientCheckpointingLayer):
    """Spatial and temporal attention side by side, mixed by a gate, with a residual connection around all (figure 2)."""

    def __init__(self, config: GMANConfig):
        super().__init__()
        is_grouped = config.group_size is not None
        self.spatial_attention = (GMANGroupSpatialAttention if is_grouped else GMANSpatialAttention)(config)
        self.temporal_attention = GMANTemporalAttention(config)
        self.fusion = GMANGatedFusion(config)

    def forward(
        self, hidden_states: torch.Tensor, embeddings: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """States and spatio-temporal embeddings `(batch, steps, nodes, hidden_size)` -> states, spatial and temporal weights."""
        states = torch.cat([hidden_states, embeddings], dim=-1)
        spatial, spatial_weights = self.spatial_attention(states, output_attentions)
        temporal, temporal_weights = self.temporal_attention(states, output_attentions)
        return hidden_states + self.fusion(spatial, temporal), spatial_weights, temporal_weights


class GMANPreTrainedModel(HubModelMixin, PreTrainedModel):
    """Base class of all GMAN models."""

    config: GMANConfig
    base_model_prefix = "gman"
    main_input_name = "past_values"
    input_modalities = ("time",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["GMANBlock", "GMANEmbeddings"]
    _supports_sdpa = True
    # heads are 8 wide
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, GMANGroupSpatialAttention):
            init.copy_(module.node_permutation, torch.randperm(len(module.node_permutation)))
        elif isinstance(module, GMANEmbeddings):
            init.normal_(module.spatial_embedding)
        else:
            super()._init_weights(module)


class GMANModel(GMANPreTrainedModel):
    """GMAN without the output layers.

    The vectors that tell the sensors apart are the buffer `embeddings.spatial_embedding`, `(num_nodes, spatial_embedding_dim)`,
    which is saved with the model and not trained. They are random until [`~GMANModel.set_spatial_embedding`] gives them a
    meaning.
    """

    def __init__(self, config: GMANConfig):
        super().__init__(config)
        self.input_projection = GMANMLP(config, 1, config.hidden_size)
        self.embeddings = GMANEmbeddings(config)
        self.encoder = nn.ModuleList([GMANBlock(config) for _ in range(config.num_hidden_layers)])
        self.transform_attention = GMANTransformAttention(config)
        self.decoder = nn.ModuleList([GMANBlock(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def set_spatial_embedding(self, spatial_embedding: torch.Tensor) -> None:
        """Set the vectors of the sensors, such as those of node2vec or of [`~hf_attn.modeling.gman.graph.spectral_embedding`].

        Raises:
            ValueError: if the shape is not `(num_nodes, spatial_embedding_dim)` or a value is not finite.
        """
        spatial_embedding, buffer = torch.as_tensor(spatial_embedding), self.embeddings.spatial_embedding
        if spatial_embedding.shape != buffer.shape:
            raise ValueError(
                "The spatial embedding must have the shape (num_nodes, spatial_embedding_dim) = "
                f"{tuple(buffer.shape)}, got {tuple(spatial_embedding.shape)}."
            )
        if buffer.is_meta:
            raise ValueError("The spatial embedding is offloaded: set it before dispatching the model.")
        if not spatial_embedding.isfinite().all():
            raise ValueError("The spatial embedding contains NaN or infinity.")
        buffer.copy_(spatial_embedding)

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        future_time_features: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> GMANModelOutput:
        """Encode the history and decode states of the future steps.

        Args:
            past_values: `(batch, context_length, num_nodes)` in real units. NaN is a missing value.
            past_time_features: `(batch, context_length, 2)`, day of week (Monday is 0) and time slot of the day. Unlike in
                other time-series models these are indices; floats are cast to integers.
            future_time_features: `(batch, prediction_length, 2)`, the same of the steps to forecast.
            past_observed_mask: `(batch, context_length, num_nodes)`, 0 where a value is missing.
            output_attentions: return the attention weights. They are of size N^2 and computed by `eager`.
            output_hidden_states: return the hidden states.
        """
        past_values, time_features = self._check_inputs(past_values, past_time_features, future_time_features)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        is_observed = ~past_values.isnan()
        if past_observed_mask is not None:
            is_observed = is_observed & past_observed_mask.to(past_values.device, torch.bool)
        # Missing values are replaced by the mean, which is neutral, unless there is a null value.
        missing = self.config.value_mean if self.config.null_value is None else self.config.null_value
        past_values = past_values.masked_fill(~is_observed, missing)
        past_values = ((past_values - self.config.value_mean) / self.config.value_std).to(self.dtype)

        embeddings = self.embeddings(time_features)
        past_embeddings, future_embeddings = embeddings.split(
            [self.config.context_length, self.config.prediction_length], dim=1
        )
        hidden_states = self.input_projection(past_values[..., None])
        all_states, spatial, temporal = [hidden_states], [], []
        for block in self.encoder:
            hidden_states, *weights = block(hidden_states, past_embeddings, output_attentions)
            all_states.append(hidden_states)
            spatial.append(weights[0])
            temporal.append(weights[1])
        hidden_states, transform = self.transform_attention(
            hidden_states, past_embeddings, future_embeddings, output_attentions
        )
        all_states.append(hidden_states)
        for block in self.decoder:
            hidden_states, *weights = block(hidden_states, future_embeddings, output_attentions)
            all_states.append(hidden_states)
            spatial.append(weights[0])
            temporal.append(weights[1])
        return GMANModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            spatial_attentions=tuple(spatial) if output_attentions else None,
            temporal_attentions=tuple(temporal) if output_attentions else None,
            transform_attentions=(transform,) if output_attentions else None,
        )

    def _check_inputs(
        self,
        past_values: torch.Tensor | None,
        past_time_features: torch.Tensor | None,
        future_time_features: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The history, and the time features of all steps as integers."""
        config = self.config
        inputs = {
            "past_values": (past_values, (config.context_length, config.num_nodes)),
            "past_time_features": (past_time_features, (config.context_length, 2)),
            "future_time_features": (future_time_features, (config.prediction_length, 2)),
        }
        for name, (tensor, shape) in inputs.items():
            if tensor is None:
                raise ValueError(f"You have to specify {name}.")
            if tensor.shape[1:] != shape or tensor.shape[0] != past_values.shape[0]:
                raise ValueError(
                    f"{name} must have the shape (batch, {shape[0]}, {shape[1]}) with batch size "
                    f"{past_values.shape[0]}, got {tuple(tensor.shape)}."
                )
        if not past_values.is_floating_point():
            past_values = past_values.to(torch.get_default_dtype())
        return past_values, torch.cat([past_time_features, future_time_features], dim=1).long()


class GMANForPrediction(GMANPreTrainedModel):
    """GMAN: a point forecast of `prediction_length` steps for all sensors at once."""

    # The loss divides by the number of observed targets of its own batch.
    accepts_loss_kwargs = False

    def __init__(self, config: GMANConfig):
        super().__init__(config)
        self.gman = GMANModel(config)
        self.head = GMANMLP(config, config.hidden_size, 1, dropout=config.output_dropout)
        self.post_init()

    def set_spatial_embedding(self, spatial_embedding: torch.Tensor) -> None:
        """See [`GMANModel.set_spatial_embedding`]."""
        self.gman.set_spatial_embedding(spatial_embedding)

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        future_time_features: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        future_values: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> GMANPredictionOutput:
        """Forecast.

        Args:
            past_values: `(batch, context_length, num_nodes)` in real units. NaN is a missing value.
            past_time_features: `(batch, context_length, 2)`, day of week (Monday is 0) and time slot of the day, as indices.
            future_time_features: `(batch, prediction_length, 2)`, the same of the steps to forecast.
            past_observed_mask: `(batch, context_length, num_nodes)`, 0 where a value is missing.
            future_values: `(batch, prediction_length, num_nodes)`, the truth in real units. NaN and `config.null_value` are
                missing values and left out of the loss.
            future_observed_mask: `(batch, prediction_length, num_nodes)`, 0 where a true value is missing.
            labels: another name of `future_values`, which `Trainer` needs for evaluation.
            output_attentions: return the attention weights. They are of size N^2 and computed by `eager`.
            output_hidden_states: return the hidden states.
        """
        if labels is not None:
            if future_values is not None:
                raise ValueError("labels and future_values are two names of the same argument; pass only one of them.")
            future_values = labels
        outputs = self.gman(
            past_values,
            past_time_features,
            future_time_features,
            past_observed_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        # Real units need more digits than half precision has.
        prediction = self.head(outputs.last_hidden_state).squeeze(-1)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        prediction = prediction * self.config.value_std + self.config.value_mean

        loss = None
        if future_values is not None:
            if future_values.shape != prediction.shape:
                raise ValueError(
                    "The true values must have the shape (batch, prediction_length, num_nodes) = "
                    f"{tuple(prediction.shape)}, got {tuple(future_values.shape)}."
                )
            observed = observed_values(future_values, self.config.null_value, future_observed_mask)
            loss = masked_mae(prediction, future_values, observed)
        size = (prediction.shape[0], 1, 1)
        return GMANPredictionOutput(
            loss=loss,
            prediction_outputs=prediction,
            loc=prediction.new_full(size, self.config.value_mean),
            scale=prediction.new_full(size, self.config.value_std),
            hidden_states=outputs.hidden_states,
            spatial_attentions=outputs.spatial_attentions,
            temporal_attentions=outputs.temporal_attentions,
            transform_attentions=outputs.transform_attentions,
        )

    @torch.no_grad()
    def generate(self, past_values: torch.Tensor, **kwargs) -> SampleTSPredictionOutput:
        """The forecast as the one sample `(batch, 1, prediction_length, num_nodes)` that a point forecaster has.

        Args:
            past_values: see `forward`, as are the other inputs.
        """
        return SampleTSPredictionOutput(sequences=self(past_values, **kwargs).prediction_outputs[:, None])


__all__ = ["GMANForPrediction", "GMANModel", "GMANPreTrainedModel"]
