"""The official networks, as implemented by spandrel."""

import torch


SMALL_NETWORK = {
    "hat": {"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "upscale": 4, "squeeze_factor": 5},
    "drct": {"embed_dim": 12, "depths": [6, 6], "num_heads": [2, 2], "gc": 4, "upscale": 3},
}


def spandrel_network(family: str, **overrides):
    """An official network with random weights everywhere."""
    torch.manual_seed(0)
    if family == "hat":
        from spandrel.architectures.HAT import HAT as Network
    else:
        from spandrel.architectures.DRCT import DRCT as Network
    network = Network(img_size=64, window_size=16, mlp_ratio=2, upsampler="pixelshuffle", **overrides).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "bias_table")):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return network
