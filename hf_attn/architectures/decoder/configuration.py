"""Configuration that decoders and encoders of this package extend."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from ...hub import HubConfigMixin
from ..variants import VariantsMixin


@strict
class DecoderConfig(HubConfigMixin, VariantsMixin, LlamaConfig):
    r"""Configuration of a Llama-like decoder, as wide as the bases that `from_base` takes.

    Args:
        attention_output_bias (`bool`, *optional*): whether the output projection has a bias; as `attention_bias` (which is
            about queries, keys and values) if not given.
        qk_norm (`bool`): whether queries and keys are normalised in each head, as in Qwen3.
        norm_type (`str`): `"rms_norm"` or `"layer_norm"`.
        norm_bias (`bool`): whether layer norms have a bias.
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        sliding_window (`int`, *optional*): width of the attention window of layers of type `sliding_attention`.
        layer_types (`list[str]`, *optional*): `full_attention` or `sliding_attention` for each layer; all of the second
            kind if there is a `sliding_window`, else of the first.

    The other arguments are those of [`~transformers.LlamaConfig`].
    """

    #: whether a token attends only to itself and earlier tokens
    is_causal: ClassVar[bool] = True

    attention_output_bias: bool | None = None
    qk_norm: bool = False
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_bias: bool = True
    gated_mlp: bool = True
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if not self.gated_mlp:
            plan = self.base_model_tp_plan or {}
            self.base_model_tp_plan = {name: how for name, how in plan.items() if not name.endswith(".gate_proj")}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs. Unlike a Llama's, `head_dim` is free; see `validate_heads`."""


@strict
class EncoderConfig(DecoderConfig):
    r"""Configuration of an encoder with the layers of the decoder, in which every token attends to all tokens.

    The arguments are those of [`DecoderConfig`].
    """

    is_causal: ClassVar[bool] = False

    use_cache: bool = False
