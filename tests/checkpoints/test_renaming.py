"""Renaming of official tensors: order of rules, dropped and unknown names, collisions, fused projections."""

import pytest
import torch

from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import StateDict
from hf_attn.checkpoints.renaming import KEEP, Renaming, split_fused


NAMES = Renaming(
    (r"\.buffer$", None),
    (r"^blocks\.(\d+)\.", lambda match: f"layers.{int(match[1]) + 1}."),
    (r"\.attn\.", ".attention."),
)


def test_rules_apply_in_order_to_the_result_of_those_before():
    assert NAMES("blocks.2.attn.weight") == "layers.3.attention.weight"
    assert NAMES("head.weight") == "head.weight"


def test_unknown_names_are_left_to_be_reported_and_dropped_ones_are_listed():
    official = StateDict({name: torch.zeros(1) for name in ("blocks.0.attn.weight", "blocks.0.buffer", "head.weight")})
    assert list(NAMES.state_dict(official)) == ["layers.1.attention.weight"]
    assert NAMES.dropped(official) == ("blocks.0.buffer",)
    assert NAMES.unknown(official) == ("head.weight",)
    assert official.left_over == ["blocks.0.buffer", "head.weight"]
    assert not Renaming(KEEP).unknown(official)


def test_two_tensors_with_one_name_are_refused():
    tensors = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    with pytest.raises(ConversionError, match=r"a\.weight and b\.weight .* c\.weight"):
        Renaming((r"^[ab]\.", "c.")).state_dict(tensors)


def test_fused_projections_are_split_by_rows():
    state = split_fused(
        {"x.qkv.bias": torch.arange(6), "qkv.bias": torch.arange(3), "x.qkv_norm.bias": torch.zeros(1)}, "qkv"
    )
    assert state.keys() == {
        *(f"x.{name}_proj.bias" for name in "qkv"),
        *(f"{name}_proj.bias" for name in "qkv"),
        "x.qkv_norm.bias",
    }
    assert state["x.k_proj.bias"].tolist() == [2, 3]
