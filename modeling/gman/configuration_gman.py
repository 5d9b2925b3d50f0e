# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of GMAN."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import COUNT, FINITE, POSITIVE, RATE, SIZE, Range
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


_PORT = {
    "batch_norm_everywhere": True,
    "attention_output_layers": 1,
    "batch_norm_eps": 1e-5,
    "wrap_time_features": True,
}


@strict
class GMANConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`GMANForPrediction`]; the defaults are the model of the paper for PeMS-BAY.

    Args:
        num_nodes (`int`): sensors of the network, N.
        context_length (`int`): history steps, P.
        prediction_length (`int`): future steps, Q.
        steps_per_day (`int`): time slots of a day, T; 288 slots are 5 minutes each.
        num_hidden_layers (`int`): blocks of the encoder, and as many of the decoder, L.
        num_attention_heads (`int`): heads of all attentions, K.
        head_dim (`int`): width of a head, d. The model is `K * d` wide.
        causal (`bool`): a step attends to itself and to earlier steps only, in the temporal attention of encoder and decoder.
        group_size (`int`, *optional*): sensors in a group of the group spatial attention, M. Sensors attend within random
            groups, and groups to each other. By default every sensor attends to all sensors, as in the official code.
        output_dropout (`float`): dropout before each of the two output layers.
        spatial_embedding_dim (`int`, *optional*): width of the embeddings of the sensors; that of the model if not given.
        embedding_bias (`bool`): biases in the layers that embed sensors and steps.
        attention_scaling (`float`, *optional*): factor of the attention logits, `head_dim ** -0.5` if not given.
        attention_output_layers (`int`): layers after the heads of an attention: 2, or 1 as in the PyTorch ports.
        batch_norm_everywhere (`bool`): batch normalisation after every linear layer, as in the PyTorch ports, and not only
            before a ReLU.
        batch_norm_eps (`float`): epsilon of the batch normalisation.
        batch_norm_momentum (`float`): share of a batch in the running statistics, in PyTorch's sense.
        wrap_time_features (`bool`): take the day of week modulo 7 and the slot modulo `steps_per_day`, as in the PyTorch
            ports. By default an index out of range stands for an unknown day or slot and is embedded as a vector of zeros,
            as in the official code.
        value_mean (`float`): mean of the values of the training windows, which is subtracted from the history.
        value_std (`float`): standard deviation of the same, which it is divided by.
        null_value (`float`, *optional*): value that marks missing data. The loss leaves it out, and missing values of
            the history are set to it. `None` if every value is a measurement.
        sensor_ids (`list[str]`, *optional*): names of the sensors, in the order of the model.
    """

    model_type = "gman"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "loc",
        "scale",
        "hidden_states",
        "spatial_attentions",
        "temporal_attentions",
        "transform_attentions",
    ]
    variants = {
        "gman_pems": {"num_hidden_layers": 1, "causal": False},
        "gman_metr": {"num_nodes": 207, "num_hidden_layers": 5, "output_dropout": 0.1},
        "gman_paper": {},
        "gman_port_1": {"num_hidden_layers": 1, **_PORT},
        "gman_port_3": {"num_hidden_layers": 3, **_PORT},
        "gman_port_5": {"num_hidden_layers": 5, **_PORT},
    }
    tiny = {
        "num_nodes": 6,
        "context_length": 5,
        "prediction_length": 4,
        "steps_per_day": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 4,
    }
    ranges = {
        **dict.fromkeys(
            (
                "num_nodes",
                "context_length",
                "prediction_length",
                "steps_per_day",
                "group_size",
                "spatial_embedding_dim",
            ),
            SIZE,
        ),
        "output_dropout": RATE,
        "attention_scaling": POSITIVE,
        "attention_output_layers": COUNT,
        "batch_norm_momentum": Range(above=0, at_most=1),
        "value_mean": FINITE,
        "value_std": POSITIVE,
        "null_value": FINITE,
    }

    num_nodes: int = 325
    context_length: int = 12
    prediction_length: int = 12
    steps_per_day: int = 288
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    head_dim: int = 8
    causal: bool = True
    group_size: int | None = None
    output_dropout: float | int = 0.0
    spatial_embedding_dim: int | None = None
    embedding_bias: bool = True
    attention_scaling: float | int | None = None
    attention_output_layers: int = 2
    batch_norm_everywhere: bool = False
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.1
    wrap_time_features: bool = False
    value_mean: float | int = 0.0
    value_std: float | int = 1.0
    null_value: float | int | None = 0.0
    sensor_ids: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs):
        if self.spatial_embedding_dim is None:
            self.spatial_embedding_dim = self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the model, D."""
        return self.num_attention_heads * self.head_dim

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        if self.num_nodes < 2:
            raise ValueError(
                f"num_nodes must be at least 2, because sensors are normalised over the batch; got {self.num_nodes}."
            )
        if self.attention_output_layers not in (1, 2):
            raise ValueError(f"attention_output_layers must be 1 or 2, got {self.attention_output_layers}.")
        if self.group_size is not None and not 1 <= self.group_size <= self.num_nodes:
            raise ValueError(
                f"group_size must be between 1 and num_nodes ({self.num_nodes}), got {self.group_size}. Use None for "
                "no groups."
            )
        if self.sensor_ids is not None:
            if len(self.sensor_ids) != self.num_nodes:
                raise ValueError(f"{len(self.sensor_ids)} sensor_ids were passed for num_nodes={self.num_nodes}.")
            if len(set(self.sensor_ids)) != len(self.sensor_ids):
                repeated = sorted({name for name in self.sensor_ids if list(self.sensor_ids).count(name) > 1})
                raise ValueError(f"sensor_ids must be unique; repeated: {', '.join(repeated[:5])}.")


__all__ = ["GMANConfig"]
