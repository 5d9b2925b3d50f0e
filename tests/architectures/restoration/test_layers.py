"""Windows, shifts, masks and padding, against their definitions."""

import pytest
import torch
from torch import nn

from hf_attn.architectures.restoration.configuration import ImageRestorationConfig
from hf_attn.architectures.restoration.layers import (
    SHIFT_MASK_VALUE,
    TokenLinear,
    WindowAttention,
    merge_windows,
    pad_to_multiple,
    partition_windows,
)
from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATOverlappingAttention


def window_attention(window_size=4, shift_size=0, implementation="eager") -> WindowAttention:
    torch.manual_seed(0)
    config = ImageRestorationConfig(embed_dim=12, depths=[1], num_heads=[3], window_size=window_size)
    config._attn_implementation = implementation
    module = WindowAttention(config, 12, 3, shift_size).eval()
    torch.nn.init.normal_(module.relative_position_bias_table)
    return module


def attention_by_definition(module: WindowAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """The paper's procedure, with a mask for each window of the image from the nine regions of the rolled map."""
    _, height, width, dim = hidden_states.shape
    window, shift, heads = module.window_size, module.shift_size, module.num_heads
    rolled = hidden_states.roll((-shift, -shift), (1, 2))
    windows = partition_windows(rolled, window)
    query, key, value = (
        module.qkv(windows).view(len(windows), window**2, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    )
    logits = query @ key.transpose(-1, -2) / (dim // heads) ** 0.5
    for a in range(window**2):
        for b in range(window**2):
            dy, dx = a // window - b // window, a % window - b % window
            row = (dy + window - 1) * (2 * window - 1) + dx + window - 1
            logits[:, :, a, b] += module.relative_position_bias_table[row]
    if shift:
        labels = torch.zeros(1, height, width, 1)
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(slices):
            for j, columns in enumerate(slices):
                labels[:, rows, columns] = 3 * i + j
        labels = partition_windows(labels, window)[..., 0]
        mask = (labels[:, :, None] != labels[:, None, :]) * SHIFT_MASK_VALUE
        logits += mask.repeat(len(windows) // len(mask), 1, 1)[:, None]
    output = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return merge_windows(module.proj(output), window, height, width).roll((shift, shift), (1, 2))


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (4, 12), (12, 8)])
@pytest.mark.parametrize("shift_size", [0, 1, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_window_attention_is_what_it_is_defined_as(size, shift_size, implementation):
    module = window_attention(shift_size=shift_size, implementation=implementation)
    hidden_states = torch.randn(2, *size, 12)
    torch.testing.assert_close(
        module(hidden_states)[0], attention_by_definition(module, hidden_states), atol=1e-5, rtol=1e-5
    )


def test_attention_weights_come_in_the_order_of_the_windows():
    module = window_attention(shift_size=2)
    hidden_states = torch.randn(2, 12, 8, 12)
    _, weights = module(hidden_states)
    assert weights.shape == (2 * 6, 3, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(12, 3, 16))
    # The output is the product of the weights and the values of the rolled feature map.
    windows = partition_windows(hidden_states.roll((-2, -2), (1, 2)), 4)
    value = module.qkv(windows)[..., 24:].view(12, 16, 3, 4).transpose(1, 2)
    output = module.proj((weights @ value).transpose(1, 2).flatten(2))
    expected = merge_windows(output, 4, 12, 8).roll((2, 2), (1, 2))
    torch.testing.assert_close(module(hidden_states)[0], expected, atol=1e-6, rtol=1e-5)


def test_relative_position_indices_of_the_published_window():
    config = HATConfig(embed_dim=8, depths=[1], num_heads=[1], squeeze_factor=4)
    index = WindowAttention(config, 8, 1).relative_position_index("cpu")
    assert (index.min(), index.max()) == (0, 960)
    overlapping = HATOverlappingAttention(config, 1)
    index = overlapping.relative_position_index("cpu")
    assert index.shape == (256, 576)
    assert overlapping.relative_position_bias_table.shape[0] == 1521
    assert index.unique().numel() == 1521
    # From -880 to 640 before they are wrapped around: the corner of the query's window and that of the keys'.
    assert index[-1, 0] == -880 % 1521
    assert index[0, -1] == 640


def test_keys_beyond_the_border_are_zero_vectors_with_a_bias():
    """A window of HAT's overlapping attention that is alone in its image: 20 of 36 keys lie outside."""
    torch.manual_seed(0)
    config = HATConfig(
        embed_dim=4, depths=[1], num_heads=[1], window_size=4, compress_ratio=2, squeeze_factor=2, qkv_bias=True
    )
    config._attn_implementation = "eager"
    module = HATOverlappingAttention(config, 1).eval()
    torch.nn.init.normal_(module.relative_position_bias_table)
    hidden_states = torch.randn(1, 4, 4, 4)
    _, weights = module(hidden_states)
    query, key, _ = module.qkv(hidden_states).view(16, 3, 4).unbind(1)
    logits = module.position_bias(query)[0, 0].clone()
    inside = [(row + 1) * 6 + column + 1 for row in range(4) for column in range(4)]
    logits[:, inside] += query @ key.T / 2
    torch.testing.assert_close(weights[0, 0], logits.softmax(-1))


@pytest.mark.parametrize("size", range(1, 20))
def test_padding_reflects_as_often_as_it_has_to(size):
    row = torch.arange(size, dtype=torch.float32)
    padded = pad_to_multiple(row.expand(1, 1, size, size), 16)[0, 0, 0]
    assert len(padded) == -(-size // 16) * 16
    mirror = [*range(size), *range(size - 2, 0, -1)] or [0]
    assert padded.tolist() == [mirror[position % len(mirror)] for position in range(len(padded))]


@pytest.mark.parametrize("size", [1, 3, 16, 17])
def test_symmetric_padding_repeats_the_edge_and_always_adds(size):
    row = torch.arange(size, dtype=torch.float32)
    padded = pad_to_multiple(row.expand(1, 1, size, size), 16, "symmetric")[0, 0, 0]
    assert len(padded) == (size // 16 + 1) * 16
    mirror = [*range(size), *range(size - 1, -1, -1)]
    assert padded.tolist() == [mirror[position % len(mirror)] for position in range(len(padded))]


def test_unknown_padding():
    with pytest.raises(ValueError, match="'reflect' or 'symmetric', got 'zeros'"):
        pad_to_multiple(torch.zeros(1, 1, 3, 3), 4, "zeros")


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_tokens_are_multiplied_in_float32_where_that_is_faster(bias, monkeypatch):
    linear = TokenLinear(20, 6, bias=bias).to(torch.bfloat16)
    tokens = torch.randn(3, 900, 20, dtype=torch.bfloat16)
    exact = nn.functional.linear(tokens.double(), linear.weight.double(), linear.bias.double() if bias else None)
    products = []
    monkeypatch.setattr(
        nn.functional, "linear", lambda *args, real=nn.functional.linear: products.append(1) or real(*args)
    )
    for slow, expected in ((False, 1), (True, 3)):
        monkeypatch.setattr("hf_attn.kernels.bfloat16_cpu.PRODUCTS_ARE_SLOW", slow)
        products.clear()
        with torch.no_grad():
            output = linear(tokens)
        torch.testing.assert_close(output, exact.bfloat16(), atol=1e-6, rtol=torch.finfo(torch.bfloat16).eps)
        assert len(products) == expected
        assert linear(tokens).requires_grad
