"""CLEAR attention: properties of the mask, and every implementation against the definition."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_attn.attention.clear import clear_attention, clear_mask, pool_image, proportional_scaling
from hf_attn.kernels.clear.flex import clear_block_mask, tile_order


# (height, width, text length, radius, down factor): edges that tiles do not divide, halos larger than the image, no text,
# text that fills blocks, a radius that reaches everything
SHAPES = [
    (5, 7, 3, 2, 1),
    (20, 13, 5, 3, 1),
    (9, 30, 0, 9, 1),
    (24, 32, 6, 4, 4),
    (8, 16, 130, 3, 2),
    (33, 24, 0, 5, 3),
    (4, 4, 2, 1, 1),
    (6, 9, 4, 20, 1),
]


def random_inputs(height, width, text_length, down_factor, dtype=torch.float64, heads=3, head_dim=8):
    torch.manual_seed(0)
    shape = (2, heads, text_length + height * width, head_dim)
    inputs = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name in ("query", "key", "value")}
    if down_factor > 1:
        weight = torch.rand(1, 1, 1, down_factor, 1, down_factor, 1, dtype=dtype) / down_factor**2
        inputs["spatial_weight"] = weight.requires_grad_()
    return inputs


def with_gradients(inputs, **arguments):
    output = clear_attention(**inputs, **arguments)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return [output, *torch.autograd.grad(output, list(inputs.values()), upstream)]


# --- the mask --------------------------------------------------------------------------------------------------------


def test_the_mask_by_loops():
    height, width, text_length, radius = 3, 5, 2, 2
    mask = clear_mask(height, width, text_length, radius)
    for q in range(text_length + 15):
        for k in range(text_length + 15):
            expected = q < text_length or k < text_length
            if not expected:
                (y, x), (v, u) = divmod(q - text_length, width), divmod(k - text_length, width)
                expected = (y - v) ** 2 + (x - u) ** 2 < radius**2
            assert mask[q, k] == expected


def test_text_does_not_see_pooled_keys_and_images_see_all():
    mask = clear_mask(4, 8, 3, 1, down_factor=4)
    assert mask.shape == (35, 37)
    assert not mask[:3, 35:].any() and mask[3:, 35:].all() and mask[:3, :35].all()


@pytest.mark.parametrize(("radius", "keys"), [(1, 1), (8, 193), (16, 793)])
def test_an_inner_query_sees_an_open_disc(radius, keys):
    side = 2 * radius + 1
    assert clear_mask(side, side, 0, radius)[side * radius + radius].sum() == keys


@pytest.mark.parametrize(("radius", "gflops"), [(8, 63.5), (16, 86.6), (32, 154.1)])
def test_the_mask_has_the_cost_that_the_paper_reports(radius, gflops):
    # of a layer of FLUX.1 at 1024 x 1024 pixels with 512 text tokens; the paper prints 80.6 for r = 16 in one table and
    # what the formula gives in the other
    mask = clear_mask(64, 64, 512, radius)
    assert round(4 * 3072 * int(mask.sum()) / 1e9, 1) == gflops


def test_a_radius_beyond_the_diagonal_is_full_attention():
    inputs = random_inputs(6, 9, 4, 1)
    output = clear_attention(**inputs, grid=(6, 9), radius=11, attn_implementation="tiles")
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*inputs.values()))


def test_a_far_key_has_no_gradient():
    inputs = random_inputs(12, 12, 3, 1)
    for backend in ("tiles", "dense"):
        output = clear_attention(**inputs, grid=(12, 12), radius=3, attn_implementation=backend)
        gradient = torch.autograd.grad(output[:, :, 3].sum(), inputs["value"])[0]
        near = clear_mask(12, 12, 3, 3)[3]
        assert (gradient[:, :, ~near] == 0).all() and (gradient[:, :, near] != 0).all()


def test_a_transposed_image_gives_the_transposed_output():
    inputs = random_inputs(10, 17, 3, 1)
    order = torch.cat([torch.arange(3), 3 + torch.arange(170).view(10, 17).T.flatten()])
    transposed = {name: tensor[:, :, order] for name, tensor in inputs.items()}
    output = clear_attention(**inputs, grid=(10, 17), radius=4, attn_implementation="tiles")
    other = clear_attention(**transposed, grid=(17, 10), radius=4, attn_implementation="tiles")
    torch.testing.assert_close(other, output[:, :, order])


def test_pooling_is_a_weighted_sum_over_cells():
    states = torch.randn(1, 2, 4 * 6, 3)
    weight = torch.randn(1, 1, 1, 2, 1, 2, 1)
    pooled = pool_image(states, (4, 6), weight)
    image = states.view(1, 2, 4, 6, 3)
    for cell, (a, b) in enumerate((a, b) for a in range(2) for b in range(3)):
        block = image[:, :, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
        expected = (block * weight.view(2, 2, 1)).sum(dim=(2, 3))
        torch.testing.assert_close(pooled[:, :, cell], expected)


def test_zero_spatial_weights_are_not_the_plain_variant():
    inputs = random_inputs(8, 8, 2, 2)
    plain = {name: inputs[name] for name in ("query", "key", "value")}
    zero = {**plain, "spatial_weight": torch.zeros_like(inputs["spatial_weight"])}
    arguments = {"grid": (8, 8), "radius": 3}
    assert not torch.allclose(clear_attention(**zero, **arguments), clear_attention(**plain, **arguments), atol=1e-3)


def test_proportional_scaling():
    assert math.isclose(proportional_scaling(128, 4608), 128**-0.5)
    assert math.isclose(proportional_scaling(64, 16896, pooled=True) ** 2 * 64, math.log(168960) / math.log(4608))


# --- implementations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["dense", "tiles", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_implementations_agree(shape, backend, masked):
    height, width, text_length, radius, down_factor = shape
    inputs = random_inputs(height, width, text_length, down_factor)
    arguments = {"grid": (height, width), "radius": radius, "scaling": 0.7}
    if masked:
        arguments["text_mask"] = torch.arange(text_length) < torch.tensor([[text_length // 2], [0]])
    expected = with_gradients(inputs, attn_implementation="eager", **arguments)
    computed = with_gradients(inputs, attn_implementation=backend, **arguments)
    torch.testing.assert_close(computed, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_agrees_where_the_cpu_has_it(shape):
    height, width, text_length, radius, down_factor = shape
    inputs = random_inputs(height, width, text_length, down_factor)
    arguments = {"grid": (height, width), "radius": radius}
    with torch.no_grad():
        expected = clear_attention(**inputs, attn_implementation="eager", **arguments)
        torch.testing.assert_close(clear_attention(**inputs, attn_implementation="flex", **arguments), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (48, 64, 300, 20, 4), (40, 64, 0, 9, 1)], ids=str)
def test_the_blocks_of_flex_hold_what_the_mask_allows(shape):
    """The uncompiled function ignores the block mask, so it is compared with the mask in tile order."""
    height, width, text_length, radius, down_factor = shape
    image_length, device = height * width, torch.device("cpu")
    allowed = clear_mask(height, width, text_length, radius, down_factor)
    q_order = torch.cat([tile_order(height, width, device) + text_length, torch.arange(text_length)])
    kv_order = torch.cat([q_order, torch.arange(len(q_order), allowed.shape[1])])
    allowed = allowed[q_order][:, kv_order]
    block_mask = clear_block_mask(height, width, text_length, radius, down_factor, device)

    queries, keys = torch.arange(allowed.shape[0])[:, None], torch.arange(allowed.shape[1])
    assert torch.equal(block_mask.mask_mod(0, 0, queries, keys), allowed)

    rest = -allowed.shape[1] % 128, -allowed.shape[0] % 128
    blocks = F.pad(F.pad(allowed, (0, rest[0])), (0, 0, 0, rest[1])).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, blocks.shape[2])
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks.shape[2])
    assert not (partial & full).any()
    needed, exact = partial | full, blocks.any(dim=3).any(dim=1)
    assert not (exact & ~needed).any()
    pure = image_length // 128  # the next block may contain both image and text tokens
    assert torch.equal(needed[:pure, :pure], exact[:pure, :pure])
    assert not (full & ~blocks.all(dim=3).all(dim=1))[:pure].any()


def listed(number, indices, columns):
    chosen = torch.zeros(number.shape[-1], columns, dtype=torch.bool)
    for row, (count, columns_of_row) in enumerate(zip(number[0, 0], indices[0, 0], strict=True)):
        chosen[row, columns_of_row[:count].long()] = True
    return chosen


@pytest.mark.slow
def test_compiled_flex_agrees():
    # The compiled function, which runs on GPUs, uses the block mask.
    from hf_attn.kernels.clear import flex

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 24 * 32 + 6, 32) for _ in range(3))
    arguments = {"grid": (24, 32), "radius": 4}
    expected = clear_attention(query, key, value, attn_implementation="eager", **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "flex_attention", flex._compiled_flex_attention)
        output = clear_attention(query, key, value, attn_implementation="flex", **arguments)
    torch.testing.assert_close(output, expected)


def test_tiles_in_bfloat16_are_as_accurate_as_the_definition():
    inputs = {name: tensor.detach() for name, tensor in random_inputs(20, 24, 7, 4, head_dim=32).items()}
    arguments = {"grid": (20, 24), "radius": 4}
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in inputs.items()}
    oracle = clear_attention(
        **{name: tensor.double() for name, tensor in narrow.items()}, attn_implementation="eager", **arguments
    )
    eager, tiles = (
        (clear_attention(**narrow, attn_implementation=backend, **arguments).double() - oracle).abs()
        for backend in ("eager", "tiles")
    )
    rounding = torch.finfo(torch.bfloat16).eps * oracle.abs()
    assert (tiles <= 2 * eager.max() + rounding).all()


def test_tiles_of_transposed_views():
    # Models pass views of (batch, length, heads, head_dim).
    query, key, value = (torch.randn(2, 9 * 11 + 4, 3, 8).transpose(1, 2) for _ in range(3))
    arguments = {"grid": (9, 11), "radius": 3}
    output = clear_attention(query, key, value, attn_implementation="tiles", **arguments)
    torch.testing.assert_close(output, clear_attention(query, key, value, attn_implementation="eager", **arguments))


def test_the_tiles_operator_is_a_proper_one():
    inputs = [torch.randn(1, 2, 9 * 10, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    shared = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.hf_attn.clear_attention_tiles, (*inputs, *shared, None, 9, 10, 3, 0.5))


def test_tiles_after_a_first_call_in_inference_mode():
    inputs = random_inputs(10, 14, 3, 1)
    arguments = {"grid": (10, 14), "radius": 6}
    for backend in ("tiles", "dense"):
        with torch.inference_mode():
            clear_attention(**inputs, attn_implementation=backend, **arguments)
        with_gradients(inputs, attn_implementation=backend, **arguments)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (6, 6)}, "36 image tokens, but the sequence has only 35 tokens"),
        ({"radius": 0}, "at least 1, got 0"),
        ({"attn_implementation": "fast"}, "has no implementation 'fast'. Use one of 'auto', 'tiles'"),
        ({"spatial_weight": torch.ones(1, 1, 1, 2, 1, 2, 1)}, "multiples of down_factor = 2, got 4 x 5"),
        ({"text_mask": torch.ones(1, 3, dtype=torch.bool)}, r"\(1, 3\) instead of .* \(1, 15\)"),
        (
            {"text_mask": torch.ones(1, 15, dtype=torch.bool), "attn_implementation": "flex"},
            "'flex' does not support this call: .* text padding.* Use attn_implementation='auto'",
        ),
    ],
)
def test_bad_input(arguments, message):
    states = torch.randn(1, 2, 35, 4)
    with pytest.raises(ValueError, match=message):
        clear_attention(states, states, states, **{"grid": (4, 5), "radius": 2, **arguments})


def test_flex_has_no_backward_on_the_cpu_and_says_so():
    states = torch.randn(1, 2, 20, 4, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        clear_attention(states, states, states, grid=(4, 5), radius=2, attn_implementation="flex")
