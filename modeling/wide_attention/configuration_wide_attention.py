# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the wide transformers."""

from copy import deepcopy
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import EncoderConfig
from hf_attn.architectures.ranges import COUNT, SIZE


#: attention type -> its arguments with their defaults; `None` is derived from the other fields
ATTENTION_TYPES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear": {},
    "linformer": {"rank": 16},
    "local": {"block_size": 20},
    "sinkhorn": {"block_size": 50, "max_blocks": None},
    "sparse": {"block_size": 128, "summary_size": 32},
    "longformer": {"window_size": 512, "num_global_tokens": 0},
    "synthesizer": {"rank": 32},
    "bigbird": {"block_size": 64, "num_random_blocks": 3, "seed": 0},
    "performer": {"num_features": 256, "kernel": "relu"},
}
_MAY_BE_ZERO = ("num_global_tokens", "num_random_blocks", "seed")
_KERNELS = ("relu", "softmax")


@strict
class WideTransformerConfig(EncoderConfig):
    r"""Configuration of a [`WideTransformerForSequenceClassification`] (arXiv 2210.00640): a pre-norm encoder whose number of
    heads in a layer is traded against the number of layers, at a constant width of the heads.

    Args:
        vocab_size (`int`): number of tokens; the default is 256 bytes and padding.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): hidden width of the feed-forward blocks and of the classifier.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`): heads in a layer. `num_attention_heads * head_dim` need not be `hidden_size`.
        head_dim (`int`): width of a head.
        max_position_embeddings (`int`): longest input in tokens, without the class token.
        attention_type (`str`): `"softmax"`, `"linear"`, `"linformer"`, `"local"`, `"sinkhorn"`, `"sparse"`, `"longformer"`,
            `"synthesizer"`, `"bigbird"` or `"performer"`.
        attention_kwargs (`dict`): arguments of the attention type, see `ATTENTION_TYPES`; those that are not given are filled
            in.
        pooling (`str`): input of the classifier: `"cls"`, a class token in front of the text; `"first"`, the first token; or
            `"mean"` of the tokens.
        hidden_dropout_prob (`float`): dropout of embeddings and of both branches of a layer.
        attention_dropout (`float`): dropout of attention weights.

    The other arguments are those of [`~hf_attn.architectures.decoder.EncoderConfig`]. `rms_norm_eps` is the epsilon of the
    layer norms.
    """

    model_type = "wide_attention"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    ranges = {"max_position_embeddings": SIZE}
    # The grids of the paper are not known; these follow the benchmark that it uses (Long Range Arena).
    variants = {
        **{f"byte_imdb_{depth}x{16 // depth}": {"num_hidden_layers": depth, "num_attention_heads": 16 // depth}
           for depth in (4, 2, 1)},
        **{
            f"heads48_{depth}x{48 // depth}": {
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_hidden_layers": depth,
                "num_attention_heads": 48 // depth,
            }
            for depth in (6, 3, 2, 1)
        },
        **{
            f"listops_{depth}x{32 // depth}": {
                "vocab_size": 18,
                "num_labels": 10,
                "hidden_size": 512,
                "num_hidden_layers": depth,
                "num_attention_heads": 32 // depth,
                "max_position_embeddings": 2000,
            }
            for depth in (4, 2, 1)
        },
        **{
            f"matching_{depth}x{16 // depth}": {
                "hidden_size": 128,
                "head_dim": 32,
                "intermediate_size": 512,
                "num_hidden_layers": depth,
                "num_attention_heads": 16 // depth,
                "max_position_embeddings": 4000,
                "pooling": "first",
            }
            for depth in (4, 2, 1)
        },
    }  # fmt: skip
    tiny = {
        "vocab_size": 99,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }

    vocab_size: int = 257
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 1
    num_attention_heads: int = 16
    head_dim: int | None = 64
    max_position_embeddings: int = 1000
    attention_type: Literal[
        "softmax",
        "linear",
        "linformer",
        "local",
        "sinkhorn",
        "sparse",
        "longformer",
        "synthesizer",
        "bigbird",
        "performer",
    ] = "softmax"
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    pooling: Literal["cls", "first", "mean"] = "cls"
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_dropout: float | int | None = 0.1
    norm_type: Literal["rms_norm", "layer_norm"] = "layer_norm"
    gated_mlp: bool = False
    mlp_bias: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.attention_kwargs = {**ATTENTION_TYPES.get(self.attention_type, {}), **self.attention_kwargs}
        if self.attention_type == "sinkhorn" and self.attention_kwargs["max_blocks"] is None:
            block_size = self.attention_kwargs["block_size"]
            if isinstance(block_size, int) and block_size > 0:
                self.attention_kwargs["max_blocks"] = -(-(self.max_position_embeddings + 1) // block_size)
        super().__post_init__(**kwargs)

    def validate_attention(self):
        """Part of the validation that `@strict` runs."""
        known = ATTENTION_TYPES[self.attention_type]
        unknown = sorted(set(self.attention_kwargs) - set(known))
        if unknown:
            raise ValueError(
                f"attention_kwargs of attention_type={self.attention_type!r} has the unknown entries "
                f"{', '.join(unknown)}. Supported: {', '.join(known) or 'none'}."
            )
        for name, value in self.attention_kwargs.items():
            if name == "kernel":
                if value not in _KERNELS:
                    raise ValueError(
                        f"attention_kwargs['kernel'] must be one of {', '.join(_KERNELS)}, got {value!r}."
                    )
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"attention_kwargs[{name!r}] must be an integer, got {value!r}.")
            (COUNT if name in _MAY_BE_ZERO else SIZE).check(f"attention_kwargs[{name!r}]", value)
        if (
            self.attention_type == "sparse"
            and self.attention_kwargs["summary_size"] > self.attention_kwargs["block_size"]
        ):
            raise ValueError(f"summary_size must be at most block_size, got {self.attention_kwargs}.")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must equal num_attention_heads "
                f"({self.num_attention_heads}): the family does not support grouped heads."
            )

    @property
    def total_heads(self) -> int:
        """Heads of all layers together, which the paper keeps constant."""
        return self.num_hidden_layers * self.num_attention_heads


def aspect_ratio(config: WideTransformerConfig, num_layers: int) -> WideTransformerConfig:
    """The model of the same family with another number of layers: the total number of heads and all else stay the same.

    Args:
        config: any model of the family; it is not changed.
        num_layers: number of layers, a divisor of the total number of heads.

    Raises:
        ValueError: if the heads cannot be spread evenly over so many layers.
    """
    total = config.total_heads
    if not isinstance(num_layers, int) or num_layers < 1 or total % num_layers:
        possible = [layers for layers in range(1, total + 1) if total % layers == 0]
        raise ValueError(
            f"{total} heads cannot be distributed evenly over num_layers={num_layers}. Possible: "
            f"{', '.join(map(str, possible))}."
        )
    changed = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": total // num_layers,
        "num_key_value_heads": total // num_layers,
        "layer_types": None,
    }
    fields = {**deepcopy(config).to_dict(), **changed}
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        fields.pop(name, None)
    return type(config)(**fields)


__all__ = ["ATTENTION_TYPES", "WideTransformerConfig", "aspect_ratio"]
