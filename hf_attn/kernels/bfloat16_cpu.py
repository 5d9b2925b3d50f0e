"""Products of bfloat16 on CPUs that have no instructions for them."""

import torch
from torch.nn import functional as F


_CPU = torch.cpu.get_capabilities()
#: Whether products of bfloat16 are slower than those of float32 with conversions: on x86 CPUs without instructions for them.
#: Measured with PyTorch 2.14, 4096 tokens of 144 and 180 features, one thread: with avx512_bf16 bfloat16 takes a tenth of the
#: time of float32; limited to AVX-512 without it (`ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`) 1.0 to 1.8 times that of converting,
#: limited to AVX2 7 to 11 times.
PRODUCTS_ARE_SLOW = _CPU.get("architecture") == "x86_64" and not (_CPU.get("amx_bf16") or _CPU.get("avx512_bf16"))
#: how many tokens have copies in float32 at the same time
_TOKENS = 1024


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` on `(..., features)`; in float32 where that is faster and there are no gradients, some tokens at a time."""
    if (
        not PRODUCTS_ARE_SLOW
        or torch.is_grad_enabled()
        or (tokens.device.type, tokens.dtype, weight.dtype) != ("cpu", torch.bfloat16, torch.bfloat16)
    ):
        return F.linear(tokens, weight, bias)
    weight, bias = weight.float(), None if bias is None else bias.float()
    output = tokens.new_empty(*tokens.shape[:-1], weight.shape[0])
    parts = (states.flatten(0, -2).split(_TOKENS) for states in (tokens, output))
    for source, target in zip(*parts, strict=True):
        target.copy_(F.linear(source.float(), weight, bias))
    return output
