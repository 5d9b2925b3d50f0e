"""Mixers that approximate attention by fewer rows: learned projections of the tokens, and landmarks."""

import math

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import initialization as init

from .base import ProjectedMixer, at_least_float32


class LinformerMixer(ProjectedMixer):
    """Attention to `rank` learned combinations of the tokens: `softmax(Q (E K)^T / sqrt d) F V`."""

    name = "linformer"
    can_be_causal = False
    has_positions = True

    def build(self) -> None:
        super().build()
        self.e = nn.Parameter(torch.empty(self.rank, self.max_length))
        self.f = nn.Parameter(torch.empty(self.rank, self.max_length))

    def reset_parameters(self) -> None:
        for projection in (self.e, self.f):
            init.normal_(projection, std=self.rank**-0.5)

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        length = hidden_states.shape[1]
        key = self.e[:, :length] @ self.k_proj(hidden_states)
        scores = self.q_proj(hidden_states) @ key.mT / math.sqrt(self.head_dim)
        return scores.softmax(-1) @ self.f[:, :length]

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        length = hidden_states.shape[1]
        key, value = self.e[:, :length] @ self.k_proj(hidden_states), self.f[:, :length] @ self.values(hidden_states)
        return scaled_dot_product_attention(self.q_proj(hidden_states[:, start:]), key, value)


class NystromMixer(ProjectedMixer):
    """Attention through landmarks: `softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T)`, scores divided by `sqrt d`.

    The landmarks are the means of `num_landmarks` contiguous segments of `floor(length / num_landmarks)` tokens; tokens
    that are left over at the end belong to no segment. If there are fewer tokens than landmarks, each token is a landmark.
    """

    name = "nystrom_pinv"
    can_be_causal = False
    #: steps of the iteration; six are usual
    iterations = 6

    def _factors(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        landmarks = min(self.num_landmarks, hidden_states.shape[1])
        segment = hidden_states.shape[1] // landmarks
        query_landmarks, key_landmarks = (
            states[:, : landmarks * segment].unflatten(1, (landmarks, segment)).mean(2) for states in (query, key)
        )
        scale = math.sqrt(self.head_dim)
        to_landmarks = (query @ key_landmarks.mT / scale).softmax(-1)
        among_landmarks = (query_landmarks @ key_landmarks.mT / scale).softmax(-1)
        inverse = self._inverse(at_least_float32(among_landmarks)).to(query.dtype)
        return to_landmarks, inverse, query_landmarks, key

    def _inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        if self.pseudo_inverse == "exact":
            return torch.linalg.pinv(matrix)
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # The largest row and column sums bound the singular values.
        inverse = matrix.mT / (matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1))[:, None, None]
        for _ in range(self.iterations):
            product = matrix @ inverse
            inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        return inverse

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        to_landmarks, inverse, query_landmarks, key = self._factors(hidden_states)
        return to_landmarks @ inverse @ (query_landmarks @ key.mT / math.sqrt(self.head_dim)).softmax(-1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        to_landmarks, inverse, query_landmarks, key = self._factors(hidden_states)
        gathered = scaled_dot_product_attention(query_landmarks, key, self.values(hidden_states))
        return to_landmarks[:, start:] @ (inverse @ gathered)
