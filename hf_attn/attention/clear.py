"""CLEAR attention (arXiv 2412.16112): image tokens attend to a disc around them instead of to every token.

A sequence is text tokens followed by the tokens of an image, row by row. A query may attend to a key iff one of them is
text, or both are image tokens whose squared distance on the token grid is below the square of the radius. The pooled
variant adds keys at the end, each a weighted sum of a cell of image keys: image queries attend to all of them, text
queries to none. It is softmax attention otherwise.

[`clear_attention`] takes the fastest of several implementations, or the one that is named. All compute
what [`clear_attention_eager`] computes.
"""

import math
import warnings
from functools import lru_cache

import torch
from torch.nn import functional as F

from ..kernels.clear.call import ClearCall
from ..kernels.clear.flex import check_flex, clear_attention_flex
from ..kernels.clear.tiles import check_tiles, clear_attention_tiles
from .dispatch import AttentionFunction, Implementation


# Up to this many tokens a mask of all pairs costs less than what avoids it. Found by measurement.
DENSE_IS_FASTEST = 768


def clear_mask(
    height: int, width: int, text_length: int, radius: int, down_factor: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """Which query may attend to which key.

    Args:
        height: rows of the token grid; a FLUX token covers 16 x 16 pixels.
        width: columns of the token grid.
        text_length: number of text tokens.
        radius: of the disc, in tokens; the cells at exactly this distance are outside.
        down_factor: side of the cells of pooled keys, 1 for no pooled keys.
        device: where the mask is made.

    Returns:
        Boolean mask `(text + image, text + image + pooled)`, True where the query of the row attends.
    """
    image_length = height * width
    index = torch.arange(image_length, device=device)
    row, column = index // width, index % width
    squared_distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    mask = torch.ones(text_length + image_length, text_length + image_length, dtype=torch.bool, device=device)
    mask[text_length:, text_length:] = squared_distance < radius**2
    if down_factor == 1:
        return mask
    pooled = mask.new_ones(mask.shape[0], image_length // down_factor**2)
    pooled[:text_length] = False
    return torch.cat([mask, pooled], dim=1)


@lru_cache(maxsize=4)
def _cached_clear_mask(*arguments) -> torch.Tensor:
    # A tensor made in inference mode could not be part of a later backward pass.
    with torch.inference_mode(False):
        return clear_mask(*arguments)


def pool_image(states: torch.Tensor, grid: tuple[int, int], spatial_weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums over the cells of an image.

    Args:
        states: keys or values of image tokens `(batch, heads, height * width, head_dim)`.
        grid: `(height, width)`.
        spatial_weight: weights of the tokens of a cell, of `d * d` elements; published as `(1, 1, 1, d, 1, d, 1)`.

    Returns:
        `(batch, heads, (height / d) * (width / d), head_dim)`, cells row by row.
    """
    d = math.isqrt(spatial_weight.numel())
    cells = states.unflatten(2, (grid[0] // d, d, grid[1] // d, d))
    weights = spatial_weight.reshape(d, 1, d, 1).to(states.dtype)
    return (cells * weights).sum(dim=(3, 5)).flatten(2, 3)


def _with_pooled(call: ClearCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value with the pooled ones at the end."""
    if call.spatial_weight is None:
        return call.key, call.value
    return tuple(
        torch.cat([states, pool_image(states[:, :, call.text_length :], call.grid, call.spatial_weight)], dim=2)
        for states in (call.key, call.value)
    )


def _with_text_mask(mask: torch.Tensor, text_mask: torch.Tensor | None) -> torch.Tensor:
    """A mask of queries and keys without the padding of the text, `(batch or 1, 1, queries, keys)`."""
    if text_mask is None:
        return mask[None, None]
    keys = F.pad(text_mask, (0, mask.shape[-1] - text_mask.shape[-1]), value=True)
    return mask & keys[:, None, None, :]


def clear_attention_eager(call: ClearCall, found: None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """CLEAR attention, the reference implementation.

    Returns:
        Output `(batch, heads, length, head_dim)` and weights `(batch, heads, length, keys)`, pooled keys last.
    """
    query = call.query
    key, value = _with_pooled(call)
    mask = _with_text_mask(clear_mask(*call.mask_arguments(), query.device), call.text_mask)
    logits = (call.scaling * query @ key.transpose(2, 3)).masked_fill(~mask, -math.inf)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return weights @ value, weights


def clear_attention_dense(call: ClearCall, found: None = None) -> tuple[torch.Tensor, None]:
    """The same by one call of `F.scaled_dot_product_attention` with a mask of all pairs."""
    key, value = _with_pooled(call)
    mask = _with_text_mask(_cached_clear_mask(*call.mask_arguments(), call.query.device), call.text_mask)
    return F.scaled_dot_product_attention(call.query, key, value, attn_mask=mask, scale=call.scaling), None


def _flex(call: ClearCall, found: None) -> tuple[torch.Tensor, None]:
    key, value = _with_pooled(call)
    return clear_attention_flex(call.query, key, value, call.grid, call.radius, call.down_factor, call.scaling), None


def _tiles(call: ClearCall, found: None) -> tuple[torch.Tensor, None]:
    """Text queries see everything, in one call; image queries see the shared keys, text and pooled, and their tile's."""
    key, value, text_length, text_mask = call.key, call.value, call.text_length, call.text_mask
    text_key, image_key = key[:, :, :text_length], key[:, :, text_length:]
    text_value, image_value = value[:, :, :text_length], value[:, :, text_length:]
    shared_key, shared_value, shared_mask = text_key, text_value, text_mask
    if call.spatial_weight is not None:
        shared_key = torch.cat([text_key, pool_image(image_key, call.grid, call.spatial_weight)], dim=2)
        shared_value = torch.cat([text_value, pool_image(image_value, call.grid, call.spatial_weight)], dim=2)
        if text_mask is not None:
            shared_mask = F.pad(text_mask, (0, shared_key.shape[2] - text_length), value=True)
    image_output = clear_attention_tiles(
        call.query[:, :, text_length:],
        image_key,
        image_value,
        shared_key,
        shared_value,
        grid=call.grid,
        radius=call.radius,
        shared_mask=shared_mask,
        scaling=call.scaling,
    )
    if text_length == 0:
        return image_output, None
    keys_mask = None if text_mask is None else F.pad(text_mask, (0, image_key.shape[2]), value=True)[:, None, None]
    text_output = F.scaled_dot_product_attention(
        call.query[:, :, :text_length], key, value, attn_mask=keys_mask, scale=call.scaling
    )
    return torch.cat([text_output, image_output], dim=2), None


class _ClearAttention(AttentionFunction):
    def preferred(self, call: ClearCall) -> tuple[Implementation, ...]:
        candidates = super().preferred(call)
        return candidates[-2:] if call.query.shape[2] <= DENSE_IS_FASTEST else candidates


CLEAR = _ClearAttention(
    name="clear",
    call=ClearCall,
    implementations=(
        Implementation("tiles", _tiles, check_tiles),
        Implementation("flex", _flex, check_flex, gpu_kernel=True),
        Implementation("dense", clear_attention_dense),
        Implementation("eager", clear_attention_eager),
    ),
)


def clear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    spatial_weight: torch.Tensor | None = None,
    text_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    attn_implementation: str = "auto",
    backend: str | None = None,
) -> torch.Tensor:
    """CLEAR attention.

    Args:
        query: `(batch, heads, length, head_dim)`; text tokens first, then the image row by row.
        key: of the same shape.
        value: of the same shape.
        grid: `(height, width)` of the image in tokens; what is left of the length is text, maybe none.
        radius: of the disc around an image token, in tokens; the cells at exactly this distance are outside.
        spatial_weight: weights of the tokens of a pooled cell, `(1, 1, 1, d, 1, d, 1)`; None for no pooled keys. The
            cost of pooled keys is quadratic in the number of image tokens.
        text_mask: boolean `(batch, text)`, False for text that is padding and that no query attends to.
        scaling: of the logits, `head_dim ** -0.5` by default.
        attn_implementation: `"auto"`, or one of `"tiles"` (CPU), `"flex"`, `"dense"`, `"eager"`.
        backend: the old name of `attn_implementation`.

    Returns:
        Output `(batch, heads, length, head_dim)`.

    Raises:
        ValueError: if the grid does not fit the sequence, cells do not fit the grid, the radius is below 1, or an
            implementation is unknown or does not support the call.
    """
    _check(query, grid, radius, spatial_weight, text_mask)
    call = ClearCall(
        query,
        key,
        value,
        grid=grid,
        radius=radius,
        spatial_weight=spatial_weight,
        text_mask=text_mask,
        scaling=scaling,
    )
    return CLEAR(call, renamed_backend(attn_implementation, backend))[0]


def renamed_backend(attn_implementation: str, backend: str | None) -> str:
    """What to compute with, if it may still be given as `backend`."""
    if backend is None:
        return attn_implementation
    warnings.warn("CLEAR's `backend` is now called `attn_implementation`.", FutureWarning, stacklevel=3)
    return backend


def _check(query, grid, radius, spatial_weight, text_mask) -> None:
    height, width = grid
    text_length = query.shape[2] - height * width
    if text_length < 0:
        raise ValueError(
            f"A grid of {height} x {width} has {height * width} image tokens, but the sequence has only "
            f"{query.shape[2]} tokens."
        )
    if radius < 1:
        raise ValueError(f"The radius must be at least 1, got {radius}.")
    if text_mask is not None and text_mask.shape != (query.shape[0], text_length):
        raise ValueError(
            f"text_mask has shape {tuple(text_mask.shape)} instead of (batch, text) = {(query.shape[0], text_length)}."
        )
    if spatial_weight is not None:
        down_factor = math.isqrt(spatial_weight.numel())
        if down_factor < 2 or down_factor**2 != spatial_weight.numel():
            raise ValueError(
                f"spatial_weight has shape {tuple(spatial_weight.shape)}, but must contain the weights of a cell of d "
                "x d tokens, with d at least 2. Pass None for attention without pooled keys."
            )
        check_cells(grid, down_factor)


def check_cells(grid: tuple[int, int], down_factor: int) -> None:
    """Raise unless cells of pooled keys fill the grid."""
    height, width = grid
    if height % down_factor or width % down_factor:
        raise ValueError(
            f"Pooled keys need a token grid whose sides are multiples of down_factor = {down_factor}, got {height} x "
            f"{width}. Choose image sizes that are multiples of {16 * down_factor} pixels if a token is 16 pixels "
            "wide, as in FLUX and SD3."
        )


def proportional_scaling(head_dim: int, length: int, pooled: bool = False) -> float:
    """The scaling of logits that the official code uses at high resolution, `sqrt(log(length) / log(4608) / head_dim)`.

    4608 is the length at which FLUX attends to 1024 x 1024 pixels and 512 text tokens, where it makes no difference.

    Args:
        head_dim: size of a head.
        length: number of text and image tokens, without pooled keys.
        pooled: whether there are pooled keys, for which the official code counts ten times the length.
    """
    return math.sqrt(math.log(10 * length if pooled else length, 4608) / head_dim)
