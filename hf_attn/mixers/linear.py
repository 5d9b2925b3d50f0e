"""Mixers whose operator is a product of positive features of queries and keys: time and memory linear in the length."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .base import ProjectedMixer, at_least_float32


#: tokens that the causal form handles at once
_BLOCK = 128


class FeatureMixer(ProjectedMixer):
    """`M = phi(Q) phi(K)^T`, with rows that sum to 1."""

    def query_features(self, query: torch.Tensor) -> torch.Tensor:
        """Positive features; a factor that a whole row shares does not matter."""
        raise NotImplementedError

    def key_features(self, key: torch.Tensor) -> torch.Tensor:
        """Positive features; a factor that all keys of a sequence share does not matter."""
        raise NotImplementedError

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.query_features(at_least_float32(self.q_proj(hidden_states)))
        key = self.key_features(at_least_float32(self.k_proj(hidden_states)))
        weights = query @ key.mT * self.visible(hidden_states.shape[1], hidden_states.device)
        return (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        query = self.query_features(at_least_float32(self.q_proj(hidden_states[:, start:])))
        key = self.key_features(at_least_float32(self.k_proj(hidden_states)))
        # One more value, which is 1, adds up the weights.
        value = nn.functional.pad(at_least_float32(self.values(hidden_states)), (0, 1), value=1.0)
        if not self.causal:
            mixed = query @ (key.mT @ value)
        else:
            mixed = _causal_product(query, key[:, start:], value[:, start:], key[:, :start].mT @ value[:, :start])
        return (mixed[..., :-1] / mixed[..., -1:]).to(hidden_states.dtype)


def _causal_product(query, key, value, state) -> torch.Tensor:
    """`tril(Q K^T) V` and what an earlier `K^T V` adds, block by block."""
    mixed = []
    for block in range(0, query.shape[1], _BLOCK):
        q, k, v = (states[:, block : block + _BLOCK] for states in (query, key, value))
        mixed.append((q @ k.mT).tril() @ v + q @ state)
        state = state + k.mT @ v
    return torch.cat(mixed, 1)


class LinearEluMixer(FeatureMixer):
    """Linear attention, `phi = elu + 1`."""

    name = "linear_elu"

    def query_features(self, query: torch.Tensor) -> torch.Tensor:
        return nn.functional.elu(query) + 1

    key_features = query_features


class PerformerMixer(FeatureMixer):
    """Positive random features of the softmax kernel, `exp(t Om^T - |t|^2 / 2) / sqrt r` of `t = q / d^(1/4)`.

    The features `Om` are drawn once and are not trained.
    """

    name = "performer"

    def build(self) -> None:
        super().build()
        self.register_buffer("features", torch.empty(self.rank, self.head_dim))

    def reset_parameters(self) -> None:
        init.normal_(self.features)

    def _exponents(self, states: torch.Tensor) -> torch.Tensor:
        states = states / math.sqrt(math.sqrt(self.head_dim))
        return states @ self.features.to(states.dtype).mT - states.square().sum(-1, keepdim=True) / 2

    def query_features(self, query: torch.Tensor) -> torch.Tensor:
        exponents = self._exponents(query)
        return (exponents - exponents.amax(-1, keepdim=True)).exp()

    def key_features(self, key: torch.Tensor) -> torch.Tensor:
        exponents = self._exponents(key)
        return (exponents - exponents.amax((-2, -1), keepdim=True)).exp()
