"""The two layouts of rotated projections."""

import torch

from hf_attn.architectures.rotary import half_split, interleaved


def test_half_split_pairs_what_the_official_rotation_pairs():
    """Scores of interleaved rotation with the official rows equal those of half-split rotation with our rows."""
    torch.manual_seed(0)
    head_dim, width = 8, 16
    projections = torch.randn(2, 3 * head_dim, width, dtype=torch.float64)
    states = torch.randn(5, width, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def official(projection):
        pairs = torch.view_as_complex((states @ projection.T).unflatten(-1, (3, head_dim // 2, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def ours(projection):
        first, second = (states @ half_split(projection, head_dim).T).unflatten(-1, (3, head_dim)).chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    expected, scores = (
        torch.einsum("ihd,jhd->hij", *(rotate(projection) for projection in projections))
        for rotate in (official, ours)
    )
    torch.testing.assert_close(scores, expected)
    assert torch.equal(interleaved(half_split(projections[0], head_dim), head_dim), projections[0])
