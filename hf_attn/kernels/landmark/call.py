"""A call of landmark attention, and which calls its fused kernels serve."""

from dataclasses import dataclass

import torch

from ..call import AttentionCall, Refusal, refusal_of_fused
from ..triton_requirements import refusal_of_triton


#: What the Triton kernels keep of one row on the chip, beside a tile of the size of a block.
MAX_TRITON_HEAD_DIM = 128
TRITON_BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(eq=False)
class LandmarkCall(AttentionCall):
    """A call of landmark attention; the queries are the last `q_len` tokens of the sequence.

    Attributes:
        is_landmark: boolean `(batch, kv_len or more)`; without it there are no landmarks, and the softmax is an ordinary
            one.
        block_size: size of the blocks, if the caller knows it already, as [`landmark_block_size`] finds it; 0 if they
            are not regular. Finding it out waits for the device.
    """

    is_landmark: torch.Tensor | None = None
    block_size: int | None = None

    def regular_block_size(self) -> int:
        """The size of the blocks, found out once; 0 if they are not regular."""
        if self.block_size is None:
            self.block_size = landmark_block_size(self.is_landmark, self.key.shape[2])
        return self.block_size


def landmark_block_size(is_landmark: torch.Tensor | None, kv_len: int) -> int:
    """Size of the blocks if they are regular: every row has its landmarks at the ends of blocks of one size, counted from
    the first key. It is `kv_len + 1` if there are no landmarks, and 0 if the blocks are not regular."""
    if is_landmark is None:
        return kv_len + 1
    is_landmark = is_landmark[:, :kv_len]
    found = is_landmark[:1].nonzero()
    if len(found) == 0:
        return 0 if is_landmark.any() else kv_len + 1
    size = int(found[0, 1]) + 1
    regular = torch.arange(1, kv_len + 1, device=is_landmark.device) % size == 0
    return size if size > 1 and bool((is_landmark == regular).all()) else 0


def check_blockwise(call: LandmarkCall) -> Refusal | int:
    """Whether [`hf_attn.kernels.landmark.blockwise.landmark_attention_blockwise`] supports a call.

    Returns:
        The size of the blocks, or why not.
    """
    refusal = refusal_of_fused(call)
    if refusal is not None:
        return refusal
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    is_landmark, mask = call.is_landmark, call.attention_mask
    if torch.compiler.is_compiling():
        return Refusal("it needs the positions of the landmarks, which are unknown in a compiled graph")
    if q_len > kv_len:
        return Refusal(f"there are more queries ({q_len}) than keys ({kv_len})")
    if call.sliding_window is not None:
        return Refusal("it does not support sliding windows")
    if mask is None and not call.is_causal and q_len > 1:
        return Refusal("it is causal, but the call is not")
    if mask is not None and mask.dtype != torch.bool:
        return Refusal("it does not support additive masks, only boolean ones")
    if mask is not None and mask.shape[1] != 1:
        return Refusal("it does not support masks that differ between heads")
    if is_landmark is not None and (is_landmark.shape[0] != call.query.shape[0] or is_landmark.shape[1] < kv_len):
        expected = f"({call.query.shape[0]}, {kv_len})"
        return Refusal(f"is_landmark must have the shape {expected}, got {tuple(is_landmark.shape)}")
    if not call.regular_block_size():
        return Refusal("the landmarks are not at the ends of blocks of one size, counted from the first key")
    if mask is not None and not call.is_causal:
        allowed = mask.expand(*mask.shape[:-2], q_len, kv_len)
        if bool(allowed.triu(kv_len - q_len + 1).any()):
            return Refusal("it is causal, but the mask allows later keys")
    return call.regular_block_size()


def check_triton(call: LandmarkCall) -> Refusal | int:
    """Whether [`hf_attn.kernels.landmark.triton.landmark_attention_triton`] supports a call.

    Returns:
        The size of its tiles, which are the blocks; where there are fewer keys than a block has, any tile that holds them
        does. Or why not.
    """
    # Cheap checks come first, because reading the positions of the landmarks synchronises with the device.
    refusal = refusal_of_fused(call) or refusal_of_triton(call, MAX_TRITON_HEAD_DIM)
    if refusal is not None:
        return refusal
    size, kv_len = check_blockwise(call), call.key.shape[2]
    if isinstance(size, Refusal) or size in TRITON_BLOCK_SIZES:
        return size
    if size > kv_len and kv_len < max(TRITON_BLOCK_SIZES):
        return next(tile for tile in TRITON_BLOCK_SIZES if tile > kv_len)
    found = "there is no landmark" if size > kv_len else f"they are {size} (mem_freq={size - 1})"
    return Refusal(
        f"it supports blocks of {', '.join(map(str, TRITON_BLOCK_SIZES))} tokens, landmark included, but {found}; "
        "train with mem_freq=63, for example"
    )
