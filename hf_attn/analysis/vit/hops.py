"""How far patches look: attention by rings of the patch grid, and by relative offset.

The hop of two patches is their Chebyshev distance on the grid, max(|dr|, |dc|); ring k of a patch holds the patches at hop k
and is cut off at the border. Attention maps have the prefix tokens (class token, registers) first, then the patches row by row.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """The tokens of a vision transformer: `num_prefix_tokens`, then `rows` x `cols` patches."""

    rows: int
    cols: int
    num_prefix_tokens: int = 1

    def __post_init__(self):
        if min(self.rows, self.cols) < 1 or self.num_prefix_tokens < 0:
            raise ValueError(
                f"A grid needs at least one row and one column, and no negative number of prefix tokens; got {self}."
            )

    @property
    def num_patches(self) -> int:
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_hops(self) -> int:
        return max(self.rows, self.cols)

    def _positions(self, device=None) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(self.num_patches, device=device)
        return index // self.cols, index % self.cols

    def hops(self, device=None) -> torch.Tensor:
        """`(patches, patches)`: hop of each pair."""
        row, col = self._positions(device)
        return torch.maximum((row[:, None] - row).abs(), (col[:, None] - col).abs())

    def ring_sizes(self, device=None) -> torch.Tensor:
        """`(patches, hops)`: number of patches in each ring."""
        hops = self.hops(device)
        ones = torch.ones_like(hops)
        return ones.new_zeros(self.num_patches, self.num_hops).scatter_add_(1, hops, ones)

    def offsets(self, device=None) -> torch.Tensor:
        """`(patches, patches)`: index of each pair's offset in the flattened `(2 rows - 1, 2 cols - 1)` offset map."""
        row, col = self._positions(device)
        down, right = row - row[:, None] + self.rows - 1, col - col[:, None] + self.cols - 1
        return down * (2 * self.cols - 1) + right

    def offset_counts(self, device=None) -> torch.Tensor:
        """`(2 rows - 1, 2 cols - 1)`: number of patch pairs with each offset."""
        shape = 2 * self.rows - 1, 2 * self.cols - 1
        return torch.bincount(self.offsets(device).flatten(), minlength=shape[0] * shape[1]).view(shape)

    def patch_block(self, maps: torch.Tensor) -> torch.Tensor:
        """The patch-to-patch block of maps `(..., tokens, tokens)`.

        Raises:
            ValueError: if the maps have another number of tokens.
        """
        if maps.shape[-2:] != (self.num_tokens, self.num_tokens):
            raise ValueError(
                f"Maps of {self.num_prefix_tokens} prefix tokens and {self.rows} x {self.cols} patches are "
                f"{self.num_tokens} x {self.num_tokens}, got {tuple(maps.shape[-2:])}."
            )
        prefix = self.num_prefix_tokens
        return maps[..., prefix:, prefix:]


def ring_mass(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Attention of each patch to each of its rings: `(..., tokens, tokens)` -> `(..., patches, hops)`."""
    block = grid.patch_block(maps)
    index = grid.hops(maps.device).expand(block.shape)
    return block.new_zeros(*block.shape[:-1], grid.num_hops).scatter_add_(-1, index, block)


def ring_mean(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Attention of each patch per patch of its rings, NaN where a ring is empty; shapes as for [`ring_mass`]."""
    sizes = grid.ring_sizes(maps.device)
    return torch.where(sizes > 0, ring_mass(maps, grid) / sizes, torch.nan)


def offset_map(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Mean attention of the patch pairs with each relative offset: `(..., tokens, tokens)` -> `(..., 2 rows - 1, 2 cols - 1)`.

    The centre is the patch itself; an entry above it is attention to the patch above.
    """
    block = grid.patch_block(maps).flatten(-2)
    counts = grid.offset_counts(maps.device)
    index = grid.offsets(maps.device).flatten().expand(block.shape)
    sums = block.new_zeros(*block.shape[:-1], counts.numel()).scatter_add_(-1, index, block)
    return sums.unflatten(-1, counts.shape) / counts


def patch_entropy(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Mean entropy (natural logarithm) of the patch rows re-normalised over patches: `(..., tokens, tokens)` -> `(...)`.

    Average it over images; the entropy of the averaged map is another, larger number.
    """
    block = grid.patch_block(maps)
    rows = block / block.sum(-1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
    return -torch.xlogy(rows, rows).sum(-1).mean(-1)


@dataclass(frozen=True)
class AttentionStrength:
    """Attention of heads by hop; every tensor has the leading dimensions of the maps.

    Attributes:
        ring_mass: `(..., hops)`, mean over patches of the attention to ring k; grows with the size of the ring.
        ring_mean: `(..., hops)`, attention per patch of the ring, averaged over the patches whose ring is not empty.
        ring_pooled_mean: `(..., hops)`, all attention at hop k over the number of pairs at hop k.
        to_cls: attention of the patches to all prefix tokens.
        mean_hop: mean hop of the attention to patches.
    """

    ring_mass: torch.Tensor
    ring_mean: torch.Tensor
    ring_pooled_mean: torch.Tensor
    to_cls: torch.Tensor
    mean_hop: torch.Tensor


def attention_strength(mean_maps: torch.Tensor, grid: Grid) -> AttentionStrength:
    """The hop profile of maps that were averaged over images, `(..., tokens, tokens)`."""
    mass = ring_mass(mean_maps, grid)
    sizes = grid.ring_sizes(mean_maps.device)
    mean_mass = mass.mean(-2)
    hops = torch.arange(grid.num_hops, device=mean_maps.device)
    prefix = grid.num_prefix_tokens
    return AttentionStrength(
        ring_mass=mean_mass,
        ring_mean=ring_mean(mean_maps, grid).nanmean(-2),
        ring_pooled_mean=mass.sum(-2) / sizes.sum(0),
        to_cls=mean_maps[..., prefix:, :prefix].sum(-1).mean(-1),
        mean_hop=(mean_mass * hops).sum(-1) / mean_mass.sum(-1),
    )
