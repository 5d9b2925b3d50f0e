"""Attention patterns of heads: features of their maps, clusters of similar heads, and names for the most common patterns."""

from dataclasses import dataclass

import numpy as np
import torch

from .hops import Grid, attention_strength, offset_map


#: features of heads that need no training; pass the latents of a `VitPatternAutoencoder` as an array
FEATURES = ("maps", "offsets", "profile")
PATTERNS = ("self", "neighbourhood", "row", "column", "shifted", "key-driven", "diffuse")

_COMPONENTS = 8


def scaled_patch_maps(mean_maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Patch-to-patch maps `(heads, patches, patches)` as log(1 + x), with x = 1 for uniform attention."""
    return torch.log1p(grid.patch_block(mean_maps).flatten(0, -3) * grid.num_patches)


def head_features(mean_maps: torch.Tensor, grid: Grid, kind: str = "maps") -> np.ndarray:
    """One vector for each head of mean maps `(..., tokens, tokens)`.

    Args:
        mean_maps: attention maps averaged over images.
        grid: their tokens.
        kind: `"maps"`, the first 8 principal components of the standardised maps; `"offsets"`, those of the offset maps;
            `"profile"`, ring profile, attention to the prefix tokens and mean hop, standardised.

    Returns:
        `(heads, features)`.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in FEATURES:
        raise ValueError(
            f"There are no features called {kind!r}. Use {', '.join(FEATURES)}, or an array of shape (heads, "
            "features)."
        )
    if kind == "maps":
        return principal_components(scaled_patch_maps(mean_maps, grid).flatten(1).double().numpy())
    if kind == "offsets":
        offsets = torch.log1p(offset_map(mean_maps, grid) * grid.num_patches)
        return principal_components(offsets.flatten(-2).flatten(0, -2).double().numpy())
    strength = attention_strength(mean_maps, grid)
    ring = torch.log1p(strength.ring_mean * grid.num_patches).flatten(0, -2)
    columns = torch.cat([ring, strength.to_cls.flatten()[:, None], strength.mean_hop.flatten()[:, None]], 1).double()
    return ((columns - columns.mean(0)) / columns.std(0).clamp_min(1e-12)).numpy()


def principal_components(values: np.ndarray, components: int = _COMPONENTS) -> np.ndarray:
    """The first principal components of the rows, with signs that do not depend on the solver."""
    centred = values - values.mean(0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    count = min(components, len(singular))
    largest = np.abs(right[:count]).argmax(1)
    signs = np.sign(right[np.arange(count), largest])
    return left[:, :count] * singular[:count] * np.where(signs == 0, 1, signs)


@dataclass(frozen=True)
class HeadClusters:
    """Heads grouped by their attention patterns.

    Attributes:
        labels: `(heads,)`, cluster of each head; heads in order of layers.
        names: the pattern of each cluster's mean map, one of `PATTERNS`.
        positions: `(heads, 2)`, first two principal components of the features, for a scatter plot.
        silhouette: number of clusters -> mean silhouette. It is a hint: on heads of six known kinds it preferred 7 to 10.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    positions: np.ndarray
    silhouette: dict[int, float]


def cluster_heads(
    mean_maps: torch.Tensor,
    grid: Grid,
    num_clusters: int | None = None,
    features: str | np.ndarray = "maps",
    seed: int = 0,
) -> HeadClusters:
    """Group heads by k-means.

    Args:
        mean_maps: `(..., tokens, tokens)`, averaged over images.
        grid: their tokens.
        num_clusters: k; by default that of 2 to 10 with the largest silhouette.
        features: a kind of [`head_features`], or an array `(heads, features)` such as the latents of an auto-encoder.
        seed: of k-means.

    Raises:
        ValueError: for a number of clusters that the heads do not permit, or features of other heads.
        ImportError: if scikit-learn (the extra `analysis`) is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ImportError("Clusters need scikit-learn: `pip install 'hf_attn[analysis]'`.") from error
    heads = mean_maps.flatten(0, -3).shape[0]
    values = head_features(mean_maps, grid, features) if isinstance(features, str) else np.asarray(features)
    if values.ndim != 2 or len(values) != heads:
        raise ValueError(f"Features must have the shape ({heads}, features), one row per head; got {values.shape}.")
    if heads < 3:
        raise ValueError(f"Clusters need at least 3 heads, got {heads}.")
    if num_clusters is not None and not 2 <= num_clusters < heads:
        raise ValueError(f"num_clusters must be between 2 and {heads - 1} for {heads} heads, got {num_clusters}.")

    silhouette, found = {}, {}
    for k in sorted({*range(2, min(10, heads - 1) + 1), *([] if num_clusters is None else [num_clusters])}):
        found[k] = KMeans(k, n_init=10, random_state=seed).fit_predict(values)
        # If many heads are equal, there are fewer clusters than requested.
        silhouette[k] = float(silhouette_score(values, found[k])) if len(set(found[k])) > 1 else -1.0
    labels = found[num_clusters or max(silhouette, key=silhouette.get)]
    flat = mean_maps.flatten(0, -3)
    names = tuple(
        pattern_of(flat[torch.from_numpy(labels == label)].mean(0), grid) for label in range(labels.max() + 1)
    )
    positions = principal_components(values, 2)
    if positions.shape[1] < 2:
        positions = np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))
    return HeadClusters(labels, names, positions, silhouette)


def pattern_of(mean_map: torch.Tensor, grid: Grid) -> str:
    """The commonest pattern that a mean map `(tokens, tokens)` resembles, one of `PATTERNS`.

    Attention among patches is compared with uniform attention (1). The pattern is the one whose pairs have most: the patch itself,
    its neighbours, its row or column beyond them, one other offset that stands out among its neighbours, the tenth of the
    patches that is looked at most. Below 1.5 the head is diffuse.
    """
    block = grid.patch_block(mean_map)
    block = block / block.sum(-1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
    lift = block * grid.num_patches
    hops = grid.hops(block.device)
    row, col = grid._positions(block.device)
    same_row, same_col = row[:, None] == row, col[:, None] == col

    def mean_over(pairs: torch.Tensor) -> float:
        return lift[pairs].mean().item() if pairs.any() else 0.0

    offsets = torch.zeros(grid.num_tokens, grid.num_tokens)
    prefix = grid.num_prefix_tokens
    offsets[prefix:, prefix:] = lift
    by_offset = offset_map(offsets, grid)
    # An offset that few pairs have is noise.
    frequent = grid.offset_counts() >= grid.num_patches / 4
    frequent[grid.rows - 1, grid.cols - 1] = False
    best = torch.where(frequent, by_offset, 0).max().item()
    ring = mean_over(hops == 1)
    along_row, along_column = mean_over(same_row & (hops > 1)), mean_over(same_col & (hops > 1))
    keys = lift.mean(0).sort(descending=True).values
    scores = {
        "self": mean_over(hops == 0),
        "neighbourhood": ring,
        "row": along_row,
        "column": along_column,
        "shifted": best if best > 2 * max(ring, along_row, along_column) else 0.0,
        "key-driven": keys[: max(1, grid.num_patches // 10)].mean().item(),
    }
    # A patch that attends to itself often attends to its neighbours as well; only a larger share is a separate pattern.
    if scores["self"] < max(3 * ring, 2 * along_row, 2 * along_column):
        scores["self"] = 0.0
    name = max(scores, key=scores.get)
    return name if scores[name] >= 1.5 else "diffuse"
