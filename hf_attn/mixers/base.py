"""The template of a token mixer, and what all mixers share: sizes, padding, rows of a continued sequence."""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn


#: name -> class; filled by the classes themselves
MIXERS: dict[str, type["TokenMixer"]] = {}


class TokenMixer(nn.Module):
    """Mixed tokens `M(X) V(X)`: an operator over tokens, applied to a map of each token (arXiv 2302.06218).

    A mixer has one head, no norm and no output projection. [`TokenMixer.from_name`] makes one of the kinds in [`MIXERS`].

    Args:
        hidden_size: width of the input, D.
        head_dim: width of queries, keys and values, d; `hidden_size` if not given.
        max_length: longest input, in tokens, of a mixer that has weights for each position.
        causal: a token attends only to itself and earlier tokens.
        rank: number of rows that `linformer` projects the tokens to, and number of features of `performer`.
        num_landmarks: number of landmarks of `nystrom_pinv`.
        window: number of tokens on either side for `window` and `pooling`.
        mixing_size: hidden tokens of `mlp_mixer`, h; `2 * max_length` if not given.
        pseudo_inverse: how `nystrom_pinv` inverts: `"exact"`, or `"iterative"`, by six steps of the usual iteration,
            which stay visibly away from it.
        dtype: of the weights; torch's default if not given.

    Attributes:
        name: name in the registry.
        can_be_causal: whether it has a causal form.
        has_positions: whether it has weights for each position, so that inputs may not be longer than `max_length`.
        out_features: width of the output.
    """

    name: ClassVar[str] = ""
    can_be_causal: ClassVar[bool] = True
    has_positions: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name:
            MIXERS[cls.name] = cls

    def __init__(
        self,
        hidden_size: int,
        head_dim: int | None = None,
        max_length: int = 512,
        causal: bool = False,
        rank: int = 32,
        num_landmarks: int = 32,
        window: int = 16,
        mixing_size: int | None = None,
        pseudo_inverse: str = "exact",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        head_dim = hidden_size if head_dim is None else head_dim
        mixing_size = 2 * max_length if mixing_size is None else mixing_size
        sizes = {
            "hidden_size": hidden_size,
            "head_dim": head_dim,
            "max_length": max_length,
            "rank": rank,
            "num_landmarks": num_landmarks,
            "mixing_size": mixing_size,
        }
        for size, value in sizes.items():
            if value < 1:
                raise ValueError(f"{size} must be at least 1, got {value}.")
        if window < 0:
            raise ValueError(f"window must be at least 0, got {window}.")
        if pseudo_inverse not in ("exact", "iterative"):
            raise ValueError(f"pseudo_inverse must be 'exact' or 'iterative', got {pseudo_inverse!r}.")
        if causal and not self.can_be_causal:
            raise ValueError(
                f"The mixer {self.name!r} has no causal form, because each output depends on all tokens. Causal "
                f"mixers: {', '.join(causal_mixers())}."
            )
        self.hidden_size, self.head_dim, self.max_length, self.causal = hidden_size, head_dim, max_length, causal
        self.rank, self.num_landmarks, self.window, self.mixing_size = rank, num_landmarks, window, mixing_size
        self.pseudo_inverse = pseudo_inverse
        self.out_features = hidden_size
        self.build()
        self.to(dtype)
        self.reset_parameters()

    @staticmethod
    def from_name(name: str, *args, **kwargs) -> "TokenMixer":
        """Make a mixer.

        Args:
            name: key of [`MIXERS`].
            args: arguments of [`TokenMixer`].
            kwargs: the same by name.

        Raises:
            ValueError: if there is no such mixer, or it has no causal form although `causal` is set.
        """
        if name not in MIXERS:
            raise ValueError(f"There is no token mixer {name!r}. Mixers: {', '.join(MIXERS)}.")
        return MIXERS[name](*args, **kwargs)

    def build(self) -> None:
        """Make the weights."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights that belong to no submodule. Weights that a checkpoint has filled stay (as in transformers)."""

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The mixed values, V(X)."""
        return hidden_states

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The mixing operator as a matrix, `(batch, length, length)` with a row for each output; a readable definition.

        Raises:
            NotImplementedError: if the mixer is not a matrix over tokens that is shared by all channels.
        """
        raise NotImplementedError(
            f"The mixer {self.name!r} is not a matrix over tokens that is shared by all channels."
        )

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The mixed tokens `(batch, length - start, out_features)` of a sequence without padding, from row `start` on."""
        return self.matrix(hidden_states)[:, start:] @ self.values(hidden_states)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, start: int = 0
    ) -> torch.Tensor:
        """Mix tokens. Padding has no effect: each row is mixed as if it were alone and without padding.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, true (or 1) for tokens; the output of the others is 0.
            start: first row that is wanted; the tokens before it have been mixed earlier.

        Returns:
            `(batch, length - start, out_features)`.

        Raises:
            ValueError: if the input has another width or too many tokens, or the mask another shape, or in `torch.export` if
                there is a mask.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have the shape (batch, length, {self.hidden_size}), got "
                f"{tuple(hidden_states.shape)}."
            )
        if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"attention_mask must be (batch, length) = {tuple(hidden_states.shape[:2])}, got shape "
                f"{tuple(attention_mask.shape)}."
            )
        if 0 in hidden_states.shape[:2]:
            return hidden_states.new_zeros(len(hidden_states), hidden_states.shape[1] - start, self.out_features)
        if attention_mask is not None and torch.compiler.is_exporting():
            raise ValueError(
                "Token mixers cannot be exported with an attention_mask, because each row is mixed without its padding. Export "
                "the model without a mask, for texts of one length."
            )
        if attention_mask is None or bool(attention_mask.all()):
            self._check_length(hidden_states.shape[1])
            return self.mix(hidden_states, start)
        mixed = hidden_states.new_zeros(*hidden_states.shape[:2], self.out_features)
        for rows, tokens, first in _rows_of_equal_length(attention_mask.bool(), start):
            self._check_length(tokens.shape[1])
            alone = self.mix(hidden_states[rows[:, None], tokens], first)
            mixed = mixed.index_put((rows[:, None], tokens[:, first:]), alone)
        return mixed[:, start:]

    def _check_length(self, length: int) -> None:
        if self.has_positions and length > self.max_length:
            raise ValueError(
                f"The mixer {self.name!r} has weights for {self.max_length} positions, but got {length} tokens. "
                "Create it with a larger max_length, or truncate the input."
            )

    def visible(self, length: int, device: torch.device, window: int | None = None) -> torch.Tensor:
        """Boolean `(length, length)`: whether row i sees token j."""
        distance = torch.arange(length, device=device)
        distance = distance[:, None] - distance
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if window is None else seen & (distance.abs() <= window)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, head_dim={self.head_dim}, causal={self.causal}"


def _rows_of_equal_length(mask: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Rows with as many tokens, where these are, and how many of them come before column `start`."""
    counts = torch.stack([mask.sum(1), mask[:, :start].sum(1)], 1)
    for length, first in torch.unique(counts, dim=0).tolist():
        if length > first:
            rows = (counts == counts.new_tensor([length, first])).all(1).nonzero()[:, 0]
            yield rows, mask[rows].nonzero()[:, 1].view(len(rows), length), first


class ProjectedMixer(TokenMixer):
    """A mixer of projected values; with queries and keys unless `has_queries_and_keys` is false."""

    has_queries_and_keys: ClassVar[bool] = True

    def build(self) -> None:
        if self.has_queries_and_keys:
            self.q_proj = nn.Linear(self.hidden_size, self.head_dim, bias=False)
            self.k_proj = nn.Linear(self.hidden_size, self.head_dim, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self.head_dim, bias=False)
        self.out_features = self.head_dim

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.v_proj(hidden_states)

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`Q K^T / sqrt(d)`."""
        return self.q_proj(hidden_states) @ self.k_proj(hidden_states).mT / math.sqrt(self.head_dim)


def causal_mixers() -> list[str]:
    """Names of the mixers that have a causal form."""
    return [name for name, mixer in MIXERS.items() if mixer.can_be_causal]


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, other dtypes as they are."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
