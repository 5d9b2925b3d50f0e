"""Mixers whose operator does not depend on the input: the Fourier transform, means, convolutions, learned matrices."""

import torch
from torch import nn
from transformers import initialization as init

from .base import ProjectedMixer, TokenMixer, at_least_float32


class FourierMixer(TokenMixer):
    """Real part of the unnormalised discrete Fourier transform over tokens and channels, `Re(F^s X F^h)`."""

    name = "fourier"
    can_be_causal = False

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        mixed = torch.fft.fft2(at_least_float32(hidden_states), dim=(1, 2)).real
        return mixed[:, start:].to(hidden_states.dtype)


class PoolingMixer(TokenMixer):
    """Mean of the tokens at a distance of at most `window`; fewer at the ends."""

    name = "pooling"

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        seen = self.visible(hidden_states.shape[1], hidden_states.device, self.window).to(hidden_states.dtype)
        return (seen / seen.sum(-1, keepdim=True)).expand(len(hidden_states), -1, -1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        skipped = max(0, start - self.window)
        hidden_states, start = hidden_states[:, skipped:].mT, start - skipped
        length = hidden_states.shape[-1]
        window = min(self.window, length - 1)
        if not self.causal:
            mixed = nn.functional.avg_pool1d(hidden_states, 2 * window + 1, 1, window, count_include_pad=False)
        else:
            mixed = nn.functional.avg_pool1d(nn.functional.pad(hidden_states, (window, 0)), window + 1, 1)
            seen = torch.arange(1, length + 1, device=mixed.device).clamp(max=window + 1)
            mixed = mixed * ((window + 1) / seen).to(mixed.dtype)
        return mixed.mT[:, start:]


class MlpMixer(TokenMixer):
    """A two-layer network over tokens, `W2 gelu(W1 X)`, with the exact GELU."""

    name = "mlp_mixer"
    can_be_causal = False
    has_positions = True

    def build(self) -> None:
        self.mix_1 = nn.Parameter(torch.empty(self.mixing_size, self.max_length))
        self.mix_2 = nn.Parameter(torch.empty(self.max_length, self.mixing_size))

    def reset_parameters(self) -> None:
        init.normal_(self.mix_1, std=self.max_length**-0.5)
        init.normal_(self.mix_2, std=self.mixing_size**-0.5)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        length = hidden_states.shape[1]
        return self.mix_2[start:length] @ nn.functional.gelu(self.mix_1[:, :length] @ hidden_states)


class SpatialGatingMixer(TokenMixer):
    """`Z1 * (W Z2 + b)` with the halves of the channels `Z1` and `Z2`; the output is half as wide."""

    name = "spatial_gating"
    has_positions = True

    def build(self) -> None:
        if self.hidden_size % 2 != 0:
            raise ValueError(
                f"spatial_gating splits the channels into halves, so hidden_size must be even, got {self.hidden_size}."
            )
        self.gate = nn.Parameter(torch.empty(self.max_length, self.max_length))
        self.gate_bias = nn.Parameter(torch.empty(self.max_length))
        self.out_features = self.hidden_size // 2

    def reset_parameters(self) -> None:
        # Training starts near the identity of the first half.
        init.normal_(self.gate, std=0.1 * self.max_length**-0.5)
        init.ones_(self.gate_bias)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        length = hidden_states.shape[1]
        first, second = hidden_states.chunk(2, dim=-1)
        gate = self.gate[:length, :length]
        if self.causal:
            gate = gate.tril()
        return first[:, start:] * (gate[start:] @ second + self.gate_bias[start:length, None])


class SynthesizerRandomMixer(ProjectedMixer):
    """Attention with learned scores that do not depend on the input, `M = softmax(R)`."""

    name = "synthesizer_random"
    has_positions = True
    has_queries_and_keys = False

    def build(self) -> None:
        super().build()
        self.random_logits = nn.Parameter(torch.empty(self.max_length, self.max_length))

    def reset_parameters(self) -> None:
        init.normal_(self.random_logits)

    def matrix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        length = hidden_states.shape[1]
        seen = self.visible(length, hidden_states.device)
        weights = self.random_logits[:length, :length].masked_fill(~seen, -torch.inf).softmax(-1)
        return weights.expand(len(hidden_states), -1, -1)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self.matrix(hidden_states)[0, start:] @ self.values(hidden_states)


class AftFullMixer(ProjectedMixer):
    """Attention-free transformer: `sigmoid(Q_i)` times the mean of `V_j` with weights `exp(K_j + w_ij)`, channel by channel."""

    name = "aft_full"
    has_positions = True

    def build(self) -> None:
        super().build()
        self.aft_bias = nn.Parameter(torch.empty(self.max_length, self.max_length))

    def reset_parameters(self) -> None:
        init.normal_(self.aft_bias, std=0.02)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        length = hidden_states.shape[1]
        bias = at_least_float32(self.aft_bias[:length, :length])
        bias = bias.masked_fill(~self.visible(length, bias.device), -torch.inf)[start:]
        key, value = (at_least_float32(states) for states in (self.k_proj(hidden_states), self.values(hidden_states)))
        # Factors of a row and of a channel cancel.
        weights = (bias - bias.amax(-1, keepdim=True)).exp()
        key = (key - key.amax(1, keepdim=True)).exp()
        mixed = (weights @ (key * value)) / (weights @ key)
        return self.q_proj(hidden_states[:, start:]).sigmoid() * mixed.to(hidden_states.dtype)


class LongConvMixer(TokenMixer):
    """Causal convolution with a kernel as long as the input for each channel, by the Fourier transform.

    A state space model such as S4 is this with the kernel `C A^t B`. It is causal also where the model is not.
    """

    name = "long_conv"
    has_positions = True

    def build(self) -> None:
        self.kernel = nn.Parameter(torch.empty(self.max_length, self.hidden_size))

    def reset_parameters(self) -> None:
        init.normal_(self.kernel, std=self.max_length**-0.5)

    def mix(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        length = hidden_states.shape[1]
        signal, kernel = at_least_float32(hidden_states), at_least_float32(self.kernel[:length])
        spectrum = torch.fft.rfft(signal, n=2 * length, dim=1) * torch.fft.rfft(kernel, n=2 * length, dim=0)
        return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, start:length].to(hidden_states.dtype)
