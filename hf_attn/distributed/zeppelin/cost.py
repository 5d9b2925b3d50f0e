"""Cost model of a step: models, hardware, links and rings. Times are predictions with the constants given here.

For a sequence of `s` tokens, hidden width `h`, width of keys or values `h_kv`, feed-forward width `f`, `e` bytes per element:

    causal attention  2 s^2 h FLOP per layer      linear layers  2 (2 h^2 + 2 h h_kv + 3 h f) FLOP per token
    keys and values   2 s h_kv e bytes
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        hidden: hidden width.
        kv_hidden: width of the keys: key/value heads times head width.
        ffn: width of the gated feed-forward layers.
        layers: number of layers.
        bytes: bytes per communicated element.
    """

    hidden: int
    kv_hidden: int
    ffn: int
    layers: int
    bytes: int = 2

    @property
    def linear_flops(self) -> int:
        """FLOP of the linear layers of one layer for one token."""
        h = self.hidden
        return 2 * (2 * h * h + 2 * h * self.kv_hidden + 3 * h * self.ffn)

    def attention_flops(self, length: float) -> float:
        """FLOP of causal attention of one layer."""
        return 2 * length**2 * self.hidden

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of the keys and values of one layer."""
        return 2 * tokens * self.kv_hidden * self.bytes

    @classmethod
    def from_config(cls, config, bytes: int = 2) -> "ModelShape":
        """The shape of a Llama-like model of transformers."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.hidden_size, kv_heads * head_dim, config.intermediate_size, config.num_hidden_layers, bytes)


@dataclass(frozen=True)
class Hardware:
    """Rates of a cluster.

    Attributes:
        flops_attn: FLOP/s of a GPU in attention.
        flops_linear: FLOP/s of a GPU in linear layers.
        bw_intra: bytes/s between two GPUs of a node.
        bw_nic: bytes/s of a network card.
        nics: network cards of a node.
        lat_intra: seconds until a transfer inside a node begins.
        lat_inter: seconds until a transfer across nodes begins.
    """

    flops_attn: float
    flops_linear: float
    bw_intra: float
    bw_nic: float
    nics: int
    lat_intra: float
    lat_inter: float

    def transfer(self, size: float, inter: bool, routing: bool = False) -> float:
        """Seconds to send `size` bytes.

        With routing a transfer across nodes goes through `x` network cards of the node: dispatch to `x - 1` proxies, `x` parallel
        transfers, combination at the receiver; the best `x` is taken.
        """
        if not inter:
            return self.lat_intra + size / self.bw_intra
        times = [self.lat_inter + size / self.bw_nic]
        if routing:
            times += [self._routed(size, x) for x in range(2, self.nics + 1)]
        return min(times)

    def _routed(self, size: float, x: int) -> float:
        inside = 2 * size * (x - 1) / (x * self.bw_intra)
        return self.lat_inter + 2 * self.lat_intra + inside + size / (x * self.bw_nic)


@dataclass(frozen=True)
class Pass:
    """Costs of a pass relative to those of the forward pass: attention, communication, linear layers."""

    name: str
    attention: float
    communication: float
    linear: float


FORWARD = Pass("forward", 1.0, 1.0, 1.0)
BACKWARD = Pass("backward", 2.5, 2.0, 2.0)
PASSES = (FORWARD, BACKWARD)

#: sizes of LLaMA models as commonly published; the paper names the models, but not these numbers
MODELS = {
    "3b": ModelShape(3200, 3200, 8640, 26),
    "7b": ModelShape(4096, 4096, 11008, 32),
    "13b": ModelShape(5120, 5120, 13824, 40),
    "30b": ModelShape(6656, 6656, 17920, 60),
}

#: assumed constants: attainable rates of a GPU, and the network cards of the paper's clusters
HARDWARE = {
    "a800": Hardware(1.5e14, 2.0e14, 1.5e11, 2.4e10, 4, 5e-6, 1.5e-5),
    "h800": Hardware(4.0e14, 5.0e14, 1.5e11, 2.4e10, 8, 5e-6, 1.5e-5),
    "h200": Hardware(4.5e14, 5.5e14, 3.6e11, 4.8e10, 8, 5e-6, 1.5e-5),
}


def ring_seconds(
    model: ModelShape,
    hardware: Hardware,
    step: Pass,
    length: float,
    ranks: int,
    inter: bool,
    routing: bool,
) -> float:
    """Seconds of each rank of a ring for a sequence: a round computes on one block while the next one arrives."""
    compute = step.attention * model.attention_flops(length) / (ranks**2 * hardware.flops_attn)
    if ranks == 1:
        return compute
    send = step.communication * hardware.transfer(model.kv_bytes(length / ranks), inter, routing)
    return compute + (ranks - 1) * max(compute, send)


def crossover(model: ModelShape, hardware: Hardware, ranks: int, inter: bool) -> float:
    """Sequence length from which a round of a ring computes at least as long as it communicates, in the forward pass."""
    latency, bandwidth = (hardware.lat_inter, hardware.bw_nic) if inter else (hardware.lat_intra, hardware.bw_intra)
    a = 2 * model.hidden / (ranks**2 * hardware.flops_attn)
    b = 2 * model.kv_hidden * model.bytes / (ranks * bandwidth)
    return (b + math.sqrt(b * b + 4 * a * latency)) / (2 * a)


def with_values(base, **values):
    """A model or hardware with some values replaced."""
    return replace(base, **{name: value for name, value in values.items() if value is not None})
