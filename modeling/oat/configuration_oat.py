# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of OAT."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import COUNT, FINITE, POSITIVE, SIZE
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


#: frequencies of the sinusoidal position codes, in the words of the official code
SINUSOIDS = ("original", "exp1", "exp2", "linear")
POSITION_ENCODINGS = ("gaussian", *SINUSOIDS)
HEADS = ("pointer", "linear")

_AMAZON = {"num_rows": 6, "num_columns": 14, "max_scanpath_length": 54}


@strict
class OATConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of an [`OATForScanpathPrediction`]; the defaults are the paper's model for collages of 6 x 14 book covers.

    A scene is a grid of `num_rows` x `num_columns` objects. Scenes of other layouts are supported as well, as long as their
    rows and columns are below `num_positions`; they say where their objects are with `object_positions`.

    Args:
        num_rows (`int`): rows of the grid.
        num_columns (`int`): columns of the grid.
        num_positions (`int`, *optional*): rows and columns that the position table has codes for; the larger side of the grid if
            not given.
        crop_height (`int`): height of the image of an object.
        crop_width (`int`): width of the image of an object.
        num_channels (`int`): channels of the images.
        pyramid_levels (`int`): levels of the spatial pyramid pooling of the object encoder (2, 3 or 4 in the official code), which
            takes images of any size. 0 for a max-pooling, which takes images of `crop_height` x `crop_width` only.
        hidden_size (`int`): width of the tokens, half of it for the image and half for the position.
        encoder_layers (`int`): layers of the encoder.
        decoder_layers (`int`): layers of the decoder.
        num_attention_heads (`int`): heads of all attentions in the layers.
        intermediate_size (`int`): width of the feed-forward networks.
        activation_function (`str`): activation of the feed-forward networks.
        dropout (`float`): dropout of the decoder's inputs, of both branches of the layers, and inside of them.
        scanpath_head (`str`): `"pointer"`, which scores the encoder's tokens by object attention, or `"linear"`, an ablation with a
            class for each place of the grid.
        num_pointer_heads (`int`): heads of the object attention. Several are combined by learned weights.
        pointer_scaling_dim (`int`, *optional*): the scores are divided by its square root; `hidden_size` if not given.
        position_encoding (`str`): how the position table of a new model is made: `"gaussian"`, whose cosines fall off with the
            distance as exp(-d^2 / (2 `position_sigma`^2)); or, as ablations, sinusoids with the frequencies that the official code
            calls `"original"`, `"exp1"`, `"exp2"` and `"linear"`.
        position_sigma (`float`): width of the Gaussian, in cells.
        position_alpha (`float`): exponent or factor of the frequencies of `"exp1"`, `"exp2"` and `"linear"`.
        max_scanpath_length (`int`): ids after which `generate` stops if it is not told otherwise, those of the longest
            scanpath that the model was trained on.
    """

    model_type = "oat"
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state"]
    attribute_map = {
        "num_hidden_layers": "encoder_layers",
        "d_model": "hidden_size",
        "encoder_attention_heads": "num_attention_heads",
        "decoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "decoder_ffn_dim": "intermediate_size",
        "attention_dropout": "dropout",
        "activation_dropout": "dropout",
    }
    variants = {
        "amazon": _AMAZON,
        "yogurt": {"num_rows": 3, "num_columns": 9},
        "wine": {"num_rows": 2, "num_columns": 11},
        # Yogurt and wine shelves in one training: the table serves both.
        "shelves": {"num_rows": 3, "num_columns": 9, "num_positions": 11},
        **{f"amazon_spp{levels}": {**_AMAZON, "pyramid_levels": levels} for levels in (2, 3, 4)},
    }
    tiny = {
        "num_rows": 2,
        "num_columns": 3,
        "crop_height": 24,
        "crop_width": 20,
        "pyramid_levels": 2,
        "hidden_size": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_scanpath_length": 8,
    }
    ranges = {
        **dict.fromkeys(
            ("num_rows", "num_columns", "num_positions", "crop_height", "crop_width", "num_pointer_heads"), SIZE
        ),
        **dict.fromkeys(("pointer_scaling_dim", "max_scanpath_length"), SIZE),
        **dict.fromkeys(("pyramid_levels", "encoder_layers", "decoder_layers"), COUNT),
        "position_sigma": POSITIVE,
        "position_alpha": FINITE,
    }

    num_rows: int = 6
    num_columns: int = 14
    num_positions: int | None = None
    crop_height: int = 150
    crop_width: int = 93
    num_channels: int = 3
    pyramid_levels: int = 0
    hidden_size: int = 512
    encoder_layers: int = 4
    decoder_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    activation_function: str = "relu"
    dropout: float | int = 0.1
    scanpath_head: str = "pointer"
    num_pointer_heads: int = 2
    pointer_scaling_dim: int | None = None
    position_encoding: str = "gaussian"
    position_sigma: float | int = 2.0
    position_alpha: float | int = 1.0
    max_scanpath_length: int = 54
    use_cache: bool = True
    is_encoder_decoder: bool = True

    @property
    def num_objects(self) -> int:
        """Objects in a full grid."""
        return self.num_rows * self.num_columns

    @property
    def smallest_crop(self) -> int:
        """Side of the smallest image of which the convolutions and poolings of the object encoder leave something."""
        return 19 if self.pyramid_levels else 29

    @property
    def position_table_shape(self) -> tuple[int, int]:
        """Rows and width of the position table: a third of half a token each for row, column and flag, rounded up to even."""
        rows = self.num_positions or max(self.num_rows, self.num_columns)
        return rows, 2 * -(-(self.hidden_size // 2) // 6)

    def validate_oat(self):
        """Part of the validation that `@strict` runs."""
        for name in ("num_rows", "num_columns", "num_pointer_heads", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % 2 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be even and divisible by num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.num_positions is not None and self.num_positions < max(self.num_rows, self.num_columns):
            raise ValueError(
                f"num_positions ({self.num_positions}) must cover the grid of {self.num_rows} x {self.num_columns}."
            )
        if self.pyramid_levels < 0 or self.pyramid_levels == 1:
            raise ValueError(f"pyramid_levels must be 0 or at least 2, got {self.pyramid_levels}.")
        if self.scanpath_head not in HEADS:
            raise ValueError(f"scanpath_head must be one of {', '.join(HEADS)}, got {self.scanpath_head!r}.")
        if self.position_encoding not in POSITION_ENCODINGS:
            raise ValueError(
                f"position_encoding must be one of {', '.join(POSITION_ENCODINGS)}, got {self.position_encoding!r}."
            )
        if min(self.crop_height, self.crop_width) < self.smallest_crop:
            raise ValueError(
                f"Images of {self.crop_height} x {self.crop_width} are too small for the object encoder, which needs at least "
                f"{self.smallest_crop} x {self.smallest_crop}."
            )


__all__ = ["OATConfig"]
