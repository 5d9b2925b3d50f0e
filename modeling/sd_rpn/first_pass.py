"""The first pass of SD-RPN: a base model up to the layer from which the region proposal network branches off.

A hook on that layer records its inputs and ends the pass there, so that no later layer runs; nothing of the base is
changed, and its next call is a plain one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_sd_rpn import SdRpnConfig
from .modeling_sd_rpn import last_positions


@dataclass(frozen=True)
class ImageCells:
    """Positions of the cells of an image's RoI map in a batch of prompts.

    Attributes:
        row: the prompt.
        start: position of the image's first token.
        num_tokens: number of tokens of the image.
        grid: rows and columns of the map; its cells are the image's first tokens, row by row. For LLaVA-Next that is the
            view of the whole image, after which the tokens of its tiles follow.
    """

    row: int
    start: int
    num_tokens: int
    grid: tuple[int, int]

    @property
    def num_cells(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class FirstPass:
    """Inputs of the region proposal network from a base's first pass.

    Attributes:
        hidden_states: `(batch, sequence, hidden_size)`, output of layer `branch_layer - 1`.
        position_embeddings: cosines and sines of the rotary embedding, `(batch or 1, sequence, head_dim)` each.
        attention_mask: `(batch, sequence)`, or none if there is no padding.
        image_mask: `(batch, sequence)`, true at the tokens that are cells of a RoI map.
        images: the images of the batch, in order.
    """

    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    attention_mask: torch.Tensor | None
    image_mask: torch.Tensor
    images: list[ImageCells]

    def rpn_inputs(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> dict:
        """Keyword arguments of [`SdRpnModel`], on a device and in a dtype if they are given."""
        mask = self.attention_mask
        return {
            "hidden_states": self.hidden_states.to(device=device, dtype=dtype),
            "position_embeddings": tuple(table.to(device=device, dtype=dtype) for table in self.position_embeddings),
            "attention_mask": None if mask is None else mask.to(device=device),
            "image_mask": self.image_mask.to(device=device),
        }

    def maps(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Cut logits `(batch, cells)` of the network into one map `(rows, columns)` for each image."""
        return [
            logits[image.row, cells].view(image.grid)
            for image, cells in zip(self.images, self.cells_of_images(), strict=True)
        ]

    def cells_of_images(self) -> list[slice]:
        """Which of the cells of its prompt are those of each image."""
        used = [0] * len(self.image_mask)
        cells = []
        for image in self.images:
            begin = used[image.row]
            used[image.row] += image.num_cells
            cells.append(slice(begin, used[image.row]))
        return cells

    def question_positions(self) -> torch.LongTensor:
        """Positions `(batch, queries)` of the tokens after the first image of each prompt that are not image tokens.

        The last token is the last query of each row; rows with fewer tokens begin with it as well.
        """
        batch, sequence = self.image_mask.shape
        last = last_positions(self.attention_mask, batch, sequence, self.image_mask.device)
        is_question = self.image_mask.cumsum(dim=1).bool() & (
            torch.arange(sequence, device=last.device) < last[:, None]
        )
        if self.attention_mask is not None:
            is_question &= self.attention_mask.bool()
        for image in self.images:
            is_question[image.row, image.start : image.start + image.num_tokens] = False
        positions = last[:, None].repeat(1, int(is_question.sum(dim=1).max()) + 1)
        for row, found in enumerate(is_question):
            found = found.nonzero()[:, 0]
            positions[row, positions.shape[1] - 1 - len(found) : -1] = found
        return positions


class _BranchReached(Exception):
    """Ends a forward pass before the layer that the hook is on."""


def unwrapped_base(base: nn.Module) -> PreTrainedModel:
    """The base itself, where it is given inside a `PeftModel`; its adapters are in its layers and stay active.

    Raises:
        ValueError: for prompt tuning and similar methods, whose additional tokens would shift the positions.
    """
    if not hasattr(base, "get_base_model"):
        return base
    if base.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The base has a {base.active_peft_config.peft_type.value} adapter, which changes the prompt outside of "
            "the base's layers. Use an adapter within the layers, such as LoRA, or the base without an adapter."
        )
    return base.get_base_model()


def execution_device(base: PreTrainedModel) -> torch.device:
    """The device for the inputs of a base. Offloaded weights are on another device, for example "meta"."""
    embeddings = base.get_input_embeddings()
    for module in (base, embeddings):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return embeddings.weight.device


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Load the module's own weights, which offloading otherwise provides only during its `forward`."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def check_base(config: SdRpnConfig, base: PreTrainedModel) -> None:
    """Check that a network was made for a base.

    Raises:
        ValueError: if the base is of another type, or its decoder has another width or another number of layers.
    """
    text = base.config.get_text_config()
    wanted = (config.base_model_type, config.hidden_size, config.base_num_hidden_layers)
    found = (base.config.model_type, text.hidden_size, text.num_hidden_layers)
    if found != wanted:
        name = config.base_model_name_or_path
        raise ValueError(
            f"The region proposal network is for a {wanted[0]} whose decoder has {wanted[2]} layers of width "
            f"{wanted[1]}{f' ({name})' if name else ''}, but the base is a {found[0]} with {found[2]} layers of width "
            f"{found[1]}. Load the base that the network was trained with, or create a network for this base with "
            "SdRpnModel.from_base."
        )


@torch.no_grad()
def run_first_pass(base: PreTrainedModel, branch_layer: int, input_ids: torch.LongTensor, **inputs) -> FirstPass:
    """Run a base on prompts with images, layers 0 .. `branch_layer - 1` only, without a cache and without gradients.

    Args:
        base: a LLaVA, LLaVA-Next or Qwen2.5-VL for conditional generation.
        branch_layer: number of decoder layers to run.
        input_ids: `(batch, sequence)`, padded on either side.
        inputs: the other inputs of the base, as its processor makes them: `attention_mask`, `pixel_values` (or
            `mm_encoder_outputs`) and, for LLaVA-Next, `image_sizes`, for Qwen2.5-VL `image_grid_thw` and
            `mm_token_type_ids`. Prompts without an image are supported; their row of `image_mask` is empty.

    Raises:
        ValueError: if the image tokens of the prompts do not fit the images, or if `mm_token_type_ids` is missing.
    """
    if (
        base.config.model_type == "qwen2_5_vl"
        and "image_grid_thw" in inputs
        and inputs.get("mm_token_type_ids") is None
    ):
        raise ValueError(
            "Qwen2.5-VL needs mm_token_type_ids, as returned by the processor: without them its positions would "
            "silently be those of plain text."
        )
    has_images = inputs.get("pixel_values") is not None or inputs.get("mm_encoder_outputs") is not None
    if has_images and not (input_ids == base.config.image_token_id).any():
        raise ValueError(
            f"There are images, but no image tokens (id {base.config.image_token_id}) in the prompts. Add the "
            "processor's image placeholder to each prompt with an image, or an image entry to its chat message."
        )
    images = find_images(base.config, input_ids, inputs.get("image_sizes"), inputs.get("image_grid_thw"))
    layer = base.get_decoder().layers[branch_layer]
    hidden_states, arguments = states_before(layer, base, input_ids=input_ids, use_cache=False, **inputs)
    image_mask = torch.zeros(input_ids.shape, dtype=torch.bool, device=hidden_states.device)
    for image in images:
        image_mask[image.row, image.start : image.start + image.num_cells] = True
    return FirstPass(
        hidden_states=hidden_states,
        position_embeddings=arguments["position_embeddings"],
        attention_mask=inputs.get("attention_mask"),
        image_mask=image_mask,
        images=images,
    )


def states_before(layer: nn.Module, base: PreTrainedModel, **inputs) -> tuple[torch.Tensor, dict]:
    """Run a model up to a layer. Calls that other threads make meanwhile are not affected.

    Returns:
        The hidden states `(batch, sequence, hidden_size)` and the keyword arguments of the layer.
    """
    reached = {}
    caller = threading.get_ident()

    # A thread that saw the hook just before it was removed calls it without keyword arguments.
    def take(module, args, kwargs=None):
        if threading.get_ident() != caller:
            return
        reached["states"], reached["arguments"] = args[0], kwargs
        raise _BranchReached

    handle = layer.register_forward_pre_hook(take, with_kwargs=True)
    # Qwen2.5-VL remembers the offset of its last positions, for continuing a generation.
    holder = base.model if hasattr(base.model, "rope_deltas") else None
    rope_deltas = None if holder is None else holder.rope_deltas
    try:
        base(**inputs)
    except _BranchReached:
        pass
    finally:
        handle.remove()
        if holder is not None:
            holder.rope_deltas = rope_deltas
    return reached["states"], reached["arguments"]


def find_images(
    config: PreTrainedConfig,
    input_ids: torch.LongTensor,
    image_sizes: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
) -> list[ImageCells]:
    """Find the images of a batch by their tokens.

    Args:
        config: of the base.
        input_ids: `(batch, sequence)`.
        image_sizes: `(images, 2)`, for LLaVA-Next.
        image_grid_thw: `(images, 3)`, for Qwen2.5-VL: patches of each image in time, height and width.

    Raises:
        ValueError: if the image tokens do not make whole images, or as many as there are.
    """
    is_image = input_ids == config.image_token_id
    if config.model_type == "qwen2_5_vl":
        merge = config.vision_config.spatial_merge_size
        grids = [] if image_grid_thw is None else [(h // merge, w // merge) for _, h, w in image_grid_thw.tolist()]
        return _images_of_grids(is_image, grids)
    grid = (config.vision_config.image_size // config.vision_config.patch_size,) * 2
    cells = grid[0] * grid[1]
    if config.model_type == "llava":
        count, rest = divmod(int(is_image.sum()), cells)
        if rest:
            raise ValueError(
                f"{int(is_image.sum())} image tokens in the prompts are not a multiple of the {cells} tokens of an "
                f"image ({grid[0]}x{grid[1]} patches)."
            )
        return _images_of_grids(is_image, [grid] * count)
    runs = [(row, start, length) for row, tokens in enumerate(is_image.tolist()) for start, length in _runs(tokens)]
    wanted = len(runs) if image_sizes is None else len(image_sizes)
    if len(runs) != wanted or any(length < cells for _, _, length in runs):
        raise ValueError(
            f"The prompts have {len(runs)} runs of image tokens (of at least {cells} tokens each) for {wanted} "
            "images. Put text between consecutive images."
        )
    return [ImageCells(row, start, length, grid) for row, start, length in runs]


def _images_of_grids(is_image: torch.Tensor, grids: list[tuple[int, int]]) -> list[ImageCells]:
    """Share out the image tokens `(batch, sequence)` among images that have a token for each cell."""
    images = []
    remaining = iter(grids)
    for row, tokens in enumerate(is_image.tolist()):
        for start, length in _runs(tokens):
            end = start + length
            while start < end:
                grid = next(remaining, None)
                if grid is None or start + grid[0] * grid[1] > end:
                    raise ValueError(
                        f"The image tokens of prompt {row} do not match its images: {end - start} tokens from "
                        f"position {start} on, for "
                        f"{'no image' if grid is None else f'an image of {grid[0]}x{grid[1]} cells'}."
                    )
                images.append(ImageCells(row, start, grid[0] * grid[1], grid))
                start += grid[0] * grid[1]
    if len(images) != len(grids):
        raise ValueError(f"There are {len(grids)} images, but the prompts have image tokens for only {len(images)}.")
    return images


def _runs(tokens: list[bool]) -> list[tuple[int, int]]:
    """Start and length of each run of true values."""
    runs = []
    for position, is_image in enumerate(tokens):
        if is_image and (position == 0 or not tokens[position - 1]):
            runs.append((position, 0))
        if is_image:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    return runs


__all__ = [
    "FirstPass",
    "ImageCells",
    "check_base",
    "execution_device",
    "find_images",
    "own_weights",
    "run_first_pass",
    "states_before",
    "unwrapped_base",
]
