"""What the matrix of :mod:`tests.attention.test_matrix` has to know about a mechanism beyond its registration.

A new mechanism adds one entry to `SETUPS`; it then inherits the whole matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlamaConfig

from hf_attn.modeling.sigmoid_attention.configuration_sigmoid_attention import SigmoidAttentionConfig


class SelfAttention(nn.Module):
    """The least that an attention function may ask of the module that calls it."""

    def __init__(self, config, is_causal: bool):
        super().__init__()
        self.config = config
        self.is_causal = is_causal


@dataclass(frozen=True)
class Setup:
    """How to call a mechanism.

    Attributes:
        config: configuration that the calling module carries.
        options: name -> further keyword arguments of a call, given the numbers of heads and keys; each is a row of the
            matrix.
    """

    config: Callable[[], object]
    options: dict[str, Callable[[int, int], dict[str, torch.Tensor]]] = field(
        default_factory=lambda: {"plain": lambda heads, kv_len: {}}
    )


SETUPS: dict[str, Setup] = {
    "sigmoid": Setup(
        config=lambda: SigmoidAttentionConfig(sigmoid_bias=-1.5),
        options={
            "plain": lambda heads, kv_len: {},
            "alibi": lambda heads, kv_len: {"alibi_slopes": torch.linspace(0.1, 0.6, heads)},
        },
    ),
    "landmark": Setup(
        config=LlamaConfig,
        options={
            "plain": lambda heads, kv_len: {},
            "regular": lambda heads, kv_len: {"is_landmark": (torch.arange(kv_len) % 6 == 5).expand(2, -1)},
            "regular_16": lambda heads, kv_len: {"is_landmark": (torch.arange(kv_len) % 16 == 15).expand(2, -1)},
            "anywhere": lambda heads, kv_len: {
                "is_landmark": torch.rand(2, kv_len, generator=torch.Generator().manual_seed(5)) < 0.2
            },
        },
    ),
}
