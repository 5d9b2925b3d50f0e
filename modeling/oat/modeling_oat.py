# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""OAT, the object-level attention transformer for gaze scanpaths (arXiv 2407.13335)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer, BartEncoderLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_attn.hub import HubModelMixin

from .caches import grows, new_cache, prepare_cache
from .checks import check_labels, check_scenes
from .configuration_oat import OATConfig
from .pointer_head import OATPointerHead
from .position_table import position_table


@dataclass
class OATEncoderOutput(BaseModelOutput):
    """Encoded scenes for the decoder; a scene is encoded once for all steps and samples.

    Attributes:
        last_hidden_state: `(batch, objects + 1, hidden_size)`, the tokens of the objects, and last that of the target.
        token_embeddings: `(batch, objects + 3, hidden_size)`, image and position of each id of the decoder: objects, EOS, PAD, BOS.
        token_mask: `(batch, objects + 1)`, false for objects that a scene does not have; `None` if all scenes have all.
    """

    token_embeddings: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None


class OATObjectEncoder(nn.Module):
    """The image of an object as half a token: two convolutions, pooling and a projection."""

    def __init__(self, config: OATConfig):
        super().__init__()
        self.pyramid_levels = config.pyramid_levels
        self.conv1 = nn.Conv2d(config.num_channels, 16, kernel_size=5)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3)
        if self.pyramid_levels:
            cells = sum(4**level for level in range(self.pyramid_levels))
        else:
            height, width = (((side - 4) // 5 - 2) // 3 for side in (config.crop_height, config.crop_width))
            cells = height * width
        self.projection = nn.Linear(32 * cells, config.hidden_size // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(images, channels, height, width)` -> `(images, hidden_size / 2)`."""
        # The maximum and ReLU commute, and after the pooling there are fewer values.
        feature_maps = nn.functional.max_pool2d(self.conv1(images), 5).relu()
        feature_maps = self.conv2(feature_maps)
        if self.pyramid_levels:
            return self.projection(self._pyramid(feature_maps.relu()))
        return self.projection(nn.functional.max_pool2d(feature_maps, 3).relu().flatten(1))

    def _pyramid(self, feature_maps: torch.Tensor) -> torch.Tensor:
        """Maxima over grids of 1 x 1, 2 x 2, 4 x 4... cells; a map that does not fit its grid is surrounded by zeros."""
        levels = []
        for cells in (2**level for level in range(self.pyramid_levels)):
            height, width = feature_maps.shape[-2:]
            kernel = (-(-height // cells), -(-width // cells))
            vertical, horizontal = kernel[0] * cells - height, kernel[1] * cells - width
            padding = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
            levels.append(nn.functional.max_pool2d(nn.functional.pad(feature_maps, padding), kernel).flatten(1))
        return torch.cat(levels, dim=1)


class OATPositionCode(nn.Module):
    """Row, column and flag as half a token: `concat(W[row], W[column], W[flag])`, cut to `hidden_size / 2`.

    `W` is a fixed table, see [`hf_attn.modeling.oat.position_table`].
    """

    def __init__(self, config: OATConfig):
        super().__init__()
        self.width = config.hidden_size // 2
        self.table = nn.Buffer(torch.empty(config.position_table_shape).copy_(position_table(config)))

    def forward(self, positions: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        """Codes of positions `(..., 2)` with flags `(...)`; those just beyond the table are zero."""
        table = nn.functional.pad(self.table, (0, 0, 0, 1))
        rows, columns = positions.unbind(-1)
        return torch.cat([table[rows], table[columns], table[flags]], dim=-1)[..., : self.width]


class OATCrossAttention(BartAttention):
    """Attention of scanpaths to their scenes. All scanpaths of a scene are one sequence of queries."""

    def forward(self, hidden_states: torch.Tensor, key_value_states: torch.Tensor, **kwargs):
        """Attend.

        Args:
            hidden_states: `(batch * scanpaths, length, hidden_size)`, the scanpaths of a scene one after another.
            key_value_states: `(batch, objects + 1, hidden_size)`.
        """
        queries = hidden_states.reshape(key_value_states.shape[0], -1, hidden_states.shape[-1])
        output, weights = super().forward(queries, key_value_states=key_value_states, **kwargs)
        if weights is not None and len(queries) != len(hidden_states):
            weights = weights.unflatten(2, (-1, hidden_states.shape[1])).transpose(1, 2).flatten(0, 1)
        return output.view_as(hidden_states), weights


class OATEncoderLayer(BartEncoderLayer):
    """Post-norm encoder layer."""


class OATDecoderLayer(BartDecoderLayer):
    """Post-norm decoder layer with a cross-attention that several scanpaths of a scene share."""

    def __init__(self, config: OATConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.encoder_attn = OATCrossAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.dropout,
            is_decoder=True,
            config=config,
            layer_idx=layer_idx,
        )


class OATPreTrainedModel(HubModelMixin, PreTrainedModel):
    """Base class of all OAT models."""

    config: OATConfig
    base_model_prefix = "oat"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["OATEncoderLayer", "OATDecoderLayer", "OATObjectEncoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, BartAttention):
            # The official code is made of torch's attention, whose projections are one matrix and whose biases start at zero.
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=0.5**0.5)
                init.zeros_(projection.bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, OATPointerHead):
            for projection in (module.query_proj, module.key_proj):
                # Each head by itself.
                init.xavier_uniform_(projection.weight, gain=((module.num_heads + 1) / 2) ** 0.5)
        elif isinstance(module, OATPositionCode):
            init.copy_(module.table, position_table(self.config))
        else:
            super()._init_weights(module)


class OATEncoder(OATPreTrainedModel):
    """Encodes the objects of scenes, and once more the target."""

    _can_record_outputs = {"hidden_states": OATEncoderLayer, "attentions": BartAttention}

    def __init__(self, config: OATConfig):
        super().__init__(config)
        self.object_encoder = OATObjectEncoder(config)
        self.position_code = OATPositionCode(config)
        self.layers = nn.ModuleList([OATEncoderLayer(config, layer_idx) for layer_idx in range(config.encoder_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        target_index: torch.LongTensor | None = None,
        object_positions: torch.LongTensor | None = None,
        object_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OATEncoderOutput:
        """Encode scenes; see [`OATForScanpathPrediction.forward`] for the arguments."""
        object_positions = check_scenes(self.config, pixel_values, target_index, object_positions, object_mask)
        batch_size, num_objects = pixel_values.shape[:2]
        target = target_index.view(-1, 1)

        # EOS, PAD and BOS have no image; theirs is white.
        images = pixel_values.flatten(0, 1).to(self.object_encoder.conv1.weight.dtype)
        codes = self.object_encoder(torch.cat([images, images.new_ones(1, *images.shape[1:])]))
        objects, blank = codes[:-1].view(batch_size, num_objects, -1), codes[-1:]
        appearances = torch.cat([objects, blank.expand(batch_size, 3, -1)], dim=1)

        # BOS is at the centre of the scene; EOS and PAD, whose steps predict nothing, have a zero encoding.
        sizes = object_positions + 1
        if object_mask is not None:
            sizes = sizes * object_mask.unsqueeze(-1)
        centre = sizes.amax(dim=1, keepdim=True) // 2
        nowhere = torch.full_like(centre, self.position_code.table.shape[0]).expand(-1, 2, -1)
        positions = torch.cat([object_positions, nowhere, centre], dim=1)
        flags = torch.zeros_like(positions[..., 0]).scatter(1, target, 1)
        token_embeddings = torch.cat([appearances, self.position_code(positions, flags)], dim=-1)

        # In the grid the target is an object like any other.
        grid_code = self.position_code(object_positions, torch.zeros_like(flags[:, :num_objects]))
        grid = torch.cat([objects, grid_code], dim=-1)
        target_token = token_embeddings.take_along_dim(target.unsqueeze(-1), dim=1)
        hidden_states = torch.cat([grid, target_token], dim=1)

        token_mask = None
        if object_mask is not None:
            token_mask = nn.functional.pad(object_mask.bool(), (0, 1), value=True)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask
        )
        for layer in self.layers[: self.config.encoder_layers]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return OATEncoderOutput(
            last_hidden_state=hidden_states, token_embeddings=token_embeddings, token_mask=token_mask
        )


def sinusoidal_code(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Code of positions in a sequence, `(length,)` -> `(length, width)`: sines in even channels, cosines in odd ones."""
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions.unsqueeze(-1) * torch.exp(channels * (-math.log(10000) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


class OATDecoder(OATPreTrainedModel):
    """Reads scanpaths, one or several of each scene."""

    _can_record_outputs = {
        "hidden_states": OATDecoderLayer,
        "attentions": OutputRecorder(BartAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(OATCrossAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: OATConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([OATDecoderLayer(config, layer_idx) for layer_idx in range(config.decoder_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        encoder_outputs: OATEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode.

        Args:
            input_ids: `(batch * scanpaths, length)`, the scanpaths of a scene one after another.
            encoder_outputs: the encoded scenes.
        """
        scenes = encoder_outputs.last_hidden_state
        num_scenes, hidden_size = scenes.shape[0], scenes.shape[-1]
        if past_key_values is not None:
            prepare_cache(past_key_values)
        elif use_cache:
            past_key_values = new_cache()
        self_attention_cache = None if past_key_values is None else past_key_values.self_attention_cache

        in_scenes = input_ids.reshape(num_scenes, -1, 1)
        embeddings = encoder_outputs.token_embeddings.take_along_dim(in_scenes, dim=1)
        embeddings = embeddings.view(*input_ids.shape, hidden_size)
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        steps = torch.arange(input_ids.shape[1], device=input_ids.device) + start
        hidden_states = embeddings + sinusoidal_code(steps, hidden_size).to(embeddings.dtype)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.dropout, training=self.training)

        # By position here and below: transformers 5.24 calls the cache by another name.
        causal_mask = create_causal_mask(self.config, hidden_states, None, self_attention_cache)
        scene_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states.reshape(num_scenes, -1, hidden_size),
            attention_mask=encoder_outputs.token_mask,
            encoder_hidden_states=scenes,
        )
        for layer in self.layers[: self.config.decoder_layers]:
            hidden_states = layer(hidden_states, causal_mask, scenes, scene_mask, past_key_values, use_cache, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class OATModel(OATPreTrainedModel):
    """OAT without a head."""

    def __init__(self, config: OATConfig):
        super().__init__(config)
        self.encoder = OATEncoder(config)
        self.decoder = OATDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        target_index: torch.LongTensor | None = None,
        object_positions: torch.LongTensor | None = None,
        object_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: OATEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Encode scenes and decode scanpaths; see [`OATForScanpathPrediction.forward`] for the arguments."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                pixel_values, target_index, object_positions, object_mask, return_dict=True, **kwargs
            )
        if decoder_input_ids is None:
            # A scanpath that has not begun.
            num_tokens = encoder_outputs.token_embeddings.shape[1]
            decoder_input_ids = torch.full(
                (encoder_outputs.last_hidden_state.shape[0], 1),
                num_tokens - 1,
                device=encoder_outputs.last_hidden_state.device,
            )
        num_scenes, copies = encoder_outputs.last_hidden_state.shape[0], 1
        if self._begins_alike(decoder_input_ids, num_scenes, past_key_values, kwargs):
            copies = len(decoder_input_ids) // num_scenes
            decoder_input_ids = decoder_input_ids[::copies]
        outputs = self.decoder(
            decoder_input_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if copies > 1:
            outputs.past_key_values.self_attention_cache.batch_repeat_interleave(copies)
            outputs.last_hidden_state = outputs.last_hidden_state.repeat_interleave(copies, dim=0)
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _begins_alike(
        self, input_ids: torch.LongTensor, num_scenes: int, cache: EncoderDecoderCache | None, kwargs: dict
    ) -> bool:
        """Whether this is the first step of several scanpaths a scene that begin with the same id, which is decoded once."""
        if self.training or torch.compiler.is_compiling() or input_ids.shape[1] != 1 or len(input_ids) == num_scenes:
            return False
        shows_rows = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_attentions", "output_hidden_states")
        )
        if cache is None or shows_rows or cache.get_seq_length() > 0:
            return False
        prepare_cache(cache)
        in_scenes = input_ids.view(num_scenes, -1)
        return grows(cache) and bool((in_scenes == in_scenes[:, :1]).all())


class OATForScanpathPrediction(OATPreTrainedModel, GenerationMixin):
    """Predicts the sequence of objects in a scene that a person looks at while searching for one of them.

    Ids of a scene with N objects (the largest scene of a batch): objects 0 to N - 1, EOS = N, PAD = N + 1, BOS = N + 2. A scanpath
    is BOS, objects, EOS.
    """

    def __init__(self, config: OATConfig):
        super().__init__(config)
        self.oat = OATModel(config)
        if config.scanpath_head == "pointer":
            self.head = OATPointerHead(config)
        else:
            self.head = nn.Linear(config.hidden_size, config.num_objects + 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        target_index: torch.LongTensor | None = None,
        object_positions: torch.LongTensor | None = None,
        object_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        encoder_outputs: OATEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Score the next fixations.

        Args:
            pixel_values: `(batch, objects, channels, height, width)`, the images of the objects, RGB in [0, 1].
            target_index: `(batch,)`, the object that is searched for.
            object_positions: `(batch, objects, 2)`, row and column of each object; those of the full grid of the configuration,
                row by row, if not given.
            object_mask: `(batch, objects)`, false for the padding of smaller scenes in the batch.
            decoder_input_ids: `(batch * scanpaths, length)`, BOS and the fixations so far. Made of the labels if they are given,
                else BOS.
            labels: `(batch * scanpaths, length)`, the fixations and EOS, -100 where nothing is to be predicted. The loss is the
                cross-entropy over objects, EOS and PAD.
            encoder_outputs: encoded scenes, instead of the first four arguments.
            num_items_in_batch: divide the sum of the losses by it instead of the number of labels.

        Returns:
            `logits` `(batch * scanpaths, length, objects + 2)` of objects, EOS and PAD, and the usual outputs of an
            encoder-decoder.
        """
        if encoder_outputs is None:
            encoder_outputs = self.oat.encoder(
                pixel_values, target_index, object_positions, object_mask, return_dict=True, **kwargs
            )
        num_objects = encoder_outputs.last_hidden_state.shape[1] - 1
        if labels is not None:
            check_labels(labels, num_objects, encoder_outputs.token_mask)
            use_cache = False
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, num_objects)
        outputs = self.oat(
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if isinstance(self.head, OATPointerHead):
            scenes = (encoder_outputs.last_hidden_state, encoder_outputs.token_mask)
            folded = self._folded_head(outputs.past_key_values, encoder_outputs.last_hidden_state)
            logits = self.head(outputs.last_hidden_state, *scenes, folded)
        else:
            logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            targets = labels.to(logits.device).flatten()
            loss = fixed_cross_entropy(logits.flatten(0, 1).float(), targets, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def _folded_head(self, cache: EncoderDecoderCache | None, scenes: torch.Tensor):
        """What the head makes of the scenes, kept beside their keys and values from the first step on."""
        if cache is None or self.training or torch.is_grad_enabled():
            return None
        kept_scenes, folded = getattr(cache, "folded_head", (None, None))
        if kept_scenes is not scenes:
            folded = self.head.fold(scenes)
            cache.folded_head = (scenes, folded)
        return folded

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor, num_objects: int) -> torch.LongTensor:
        """Labels shifted by one: BOS first, PAD where a label is -100."""
        begin = labels.new_full((labels.shape[0], 1), num_objects + 2)
        return torch.cat([begin, labels[:, :-1].masked_fill(labels[:, :-1] == -100, num_objects + 1)], dim=1)

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """Predict scanpaths; see transformers' `GenerationMixin.generate`.

        The ids of BOS, EOS and PAD follow from the number of objects. As in the paper, PAD is never chosen, EOS not as the first
        fixation, and sampling draws from all objects (`top_k=0`) unless told otherwise. All scanpaths of a scene
        (`num_return_sequences`, `num_beams`) share its encoding.

        Args:
            inputs: `pixel_values`.
            generation_config: as usual. Without a length, there or here, at most `config.max_scanpath_length` ids are
                generated.
            kwargs: `target_index`, `object_positions` and `object_mask`, and the arguments of `generate`.

        Returns:
            Ids `(batch * num_return_sequences, length)`: BOS, objects, EOS, PAD; or a dictionary, as usual.
        """
        scenes = kwargs.get("pixel_values", inputs)
        if scenes is None and kwargs.get("encoder_outputs") is None:
            raise ValueError("generate needs pixel_values (the images of the objects) or encoder_outputs.")
        if scenes is not None:
            num_objects = scenes.shape[1]
        else:
            num_objects = kwargs["encoder_outputs"].last_hidden_state.shape[1] - 1
        ids = {
            "eos_token_id": num_objects,
            "pad_token_id": num_objects + 1,
            "decoder_start_token_id": num_objects + 2,
            "begin_suppress_tokens": [num_objects],
            "suppress_tokens": [num_objects + 1],
        }
        for name, value in ids.items():
            if kwargs.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be {value} for scenes of {num_objects} objects, got {kwargs[name]}. Leave it out."
                )
        given = generation_config or self.generation_config
        lengths = ("max_length", "max_new_tokens")
        if all(kwargs.get(name) is None and getattr(given, name) is None for name in lengths):
            kwargs["max_new_tokens"] = self.config.max_scanpath_length
        if kwargs.get("do_sample", given.do_sample) and given.top_k is None:
            kwargs.setdefault("top_k", 0)
        return super().generate(inputs, generation_config, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        # The encoded scenes keep one row per scene: the decoder supports several scanpaths per scene.
        scenes = {"encoder_outputs": model_kwargs.pop("encoder_outputs")}
        for name in ("pixel_values", "target_index", "object_positions", "object_mask"):
            model_kwargs.pop(name, None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | scenes

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        """Inputs of the next step; see transformers' `GenerationMixin`."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "cache" in model_inputs:  # its name from transformers 5.24 on
            model_inputs["past_key_values"] = model_inputs.pop("cache")
        return model_inputs


__all__ = ["OATForScanpathPrediction", "OATModel", "OATPreTrainedModel"]
