"""Files of road networks, and vectors that say where in the network a sensor is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text file: {error}") from None


def _numbers(path: str | Path, columns: int | None, skip: int = 0) -> np.ndarray:
    """Rows of numbers, separated by blanks or commas."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        words = line.replace(",", " ").split()
        if number <= skip or not words:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}.") from None
        if len(words) != (columns or len(rows[0])):
            raise ValueError(f"{path.name}, line {number}: {len(words)} numbers instead of {columns or len(rows[0])}.")
    return np.array(rows)


def _indices(numbers: np.ndarray, size: int, path: Path, what: str) -> np.ndarray:
    indices = numbers.astype(np.int64)
    if (indices != numbers).any() or (indices < 0).any() or (indices >= size).any():
        wrong = numbers[(indices != numbers) | (indices < 0) | (indices >= size)][0]
        raise ValueError(f"{path.name}: {what} {wrong:g} is not an index between 0 and {size - 1}.")
    return indices


def read_spatial_embedding(path: str | Path) -> torch.Tensor:
    """Read the vectors of the sensors as word2vec writes them, such as `SE(METR).txt`.

    The first line is "N D"; each other line is the index of a node and its D numbers. The lines may be in any order.

    Returns:
        `(N, D)`, in the order of the nodes.

    Raises:
        ValueError: if a node is missing or repeated, or a line has another number of numbers or one that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    header = _text(path).partition("\n")[0].split()
    if len(header) != 2 or not all(word.isdigit() for word in header):
        raise ValueError(f"{path.name}: the first line must be 'nodes width', got {' '.join(header)[:40]!r}.")
    nodes, width = map(int, header)
    numbers = _numbers(path, 1 + width, skip=1)
    if len(numbers) != nodes:
        raise ValueError(f"{path.name} has {len(numbers)} vectors, but its first line says {nodes}.")
    indices = _indices(numbers[:, 0], nodes, path, "node")
    if len(set(indices)) != nodes:
        repeated = next(index for index in indices if (indices == index).sum() > 1)
        raise ValueError(f"{path.name} has node {repeated} more than once.")
    if not np.isfinite(numbers).all():
        wrong = numbers[~np.isfinite(numbers).all(axis=1)][0, 0]
        raise ValueError(f"{path.name}: the vector of node {wrong:g} is not finite.")
    embedding = np.empty((nodes, width))
    embedding[indices] = numbers[:, 1:]
    return torch.from_numpy(embedding).float()


def read_adjacency(path: str | Path, num_nodes: int) -> np.ndarray:
    """Read the weights of a road graph.

    Args:
        path: lines "from to weight" such as `Adj(METR).txt`, where zeros mean no edge; a matrix of N lines with N numbers;
            or a `.npy` file with a matrix.
        num_nodes: N.

    Returns:
        `(N, N)`, the weight of the edge from each row to each column.

    Raises:
        ValueError: if the file holds something else, or negative weights.
    """
    path = Path(path)
    if path.suffix == ".npy":
        adjacency = np.load(path, allow_pickle=False).astype(np.float64)
    else:
        adjacency = _numbers(path, None)
        if adjacency.shape[1:] == (3,) and adjacency.shape != (num_nodes, num_nodes):
            edges = [_indices(adjacency[:, column], num_nodes, path, "node") for column in (0, 1)]
            weights = adjacency[:, 2]
            adjacency = np.zeros((num_nodes, num_nodes))
            adjacency[tuple(edges)] = weights
    if adjacency.shape != (num_nodes, num_nodes):
        raise ValueError(
            f"{path.name} must contain lines 'from to weight' or a matrix for {num_nodes} nodes, got shape "
            f"{adjacency.shape}."
        )
    if not (adjacency >= 0).all():
        raise ValueError(f"{path.name} has weights that are negative or not finite.")
    return adjacency


def adjacency_from_distances(distances: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Weights `exp(-d^2 / s^2)` of road distances, and none below the threshold.

    Args:
        distances: `(N, N)`, infinite where there is no way; `s` is the standard deviation of the finite ones.
        threshold: smallest weight that is an edge.
    """
    distances = np.asarray(distances, np.float64)
    adjacency = np.exp(-((distances / distances[np.isfinite(distances)].std()) ** 2))
    return np.where(adjacency >= threshold, adjacency, 0.0)


def spectral_embedding(adjacency: np.ndarray | Sequence[Sequence[float]], width: int) -> torch.Tensor:
    """Vectors of the nodes: the smoothest functions on the graph, the default of this package.

    They are the eigenvectors with the smallest eigenvalues, except the first, of the normalised Laplacian of the graph
    without directions, times the square root of N. The sign of an eigenvector is that which makes its largest entry positive.

    Args:
        adjacency: `(N, N)`.
        width: number of entries of a vector; those beyond N - 1 are 0.

    Returns:
        `(N, width)`.
    """
    try:
        from scipy.linalg import eigh
    except ImportError as error:
        raise ImportError("The spectral embedding needs scipy: `pip install 'hf_attn[traffic]'`.") from error
    adjacency = np.asarray(adjacency, np.float64)
    nodes = len(adjacency)
    symmetric = (adjacency + adjacency.T) / 2
    np.fill_diagonal(symmetric, 0)
    degrees = symmetric.sum(axis=1)
    inverse_root = np.where(degrees > 0, 1 / np.sqrt(np.where(degrees > 0, degrees, 1)), 0.0)
    laplacian = np.eye(nodes) - inverse_root[:, None] * symmetric * inverse_root
    last = min(width, nodes - 1)
    _, vectors = eigh(laplacian, subset_by_index=(0, last))
    vectors = vectors[:, 1:]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(last)]) * np.sqrt(nodes)
    embedding = np.zeros((nodes, width))
    embedding[:, :last] = vectors
    return torch.from_numpy(embedding).float()
