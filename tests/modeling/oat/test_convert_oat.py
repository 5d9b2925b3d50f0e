"""Official checkpoints: the position table in a separate file, sizes inferred from the weights, and bad checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_attn import from_official
from hf_attn.checkpoints.files import ConversionError
from hf_attn.modeling.oat.position_table import sinusoid_table
from tests.goldens.case import Case


CASE = Case(Path(__file__).parents[2] / "goldens" / "oat" / "learned_pe")


@pytest.fixture
def weights():
    return dict(CASE.weights)


@pytest.fixture
def table():
    return CASE.arrays["pe_table"]


def test_lightning_file_with_the_table_beside_it(weights, table, tmp_path):
    np.save(tmp_path / "table.npy", table.numpy())
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "model.ckpt")
    config = {"PE_path": str(tmp_path / "table.npy"), "rows": 2, "cols": 3, "nhead": 2, "CA_dk": 24}
    model = from_official("oat", tmp_path / "model.ckpt", config=config)
    assert torch.equal(model.oat.encoder.position_code.table, table)
    config = model.config
    assert (config.hidden_size, config.encoder_layers, config.intermediate_size) == (24, 2, 32)
    assert (config.num_pointer_heads, config.pyramid_levels, config.num_positions) == (2, 0, 3)
    model.save_pretrained(tmp_path / "converted")
    saved = load_file(tmp_path / "converted" / "model.safetensors")
    assert torch.equal(saved["oat.encoder.position_code.table"], table)


def test_sinusoids_need_no_table(weights):
    config = CASE.config | {"functionChoice": "exp1", "alpha": 0.5}
    model = from_official("oat", weights, config=config)
    assert torch.equal(model.oat.encoder.position_code.table, sinusoid_table(3, 4, "exp1", 0.5))


def test_linear_head(weights, table):
    weights = {key: value for key, value in weights.items() if "cross_attentions" not in key and "readout" not in key}
    model = from_official("oat", weights, config=CASE.config | {"CA_version": 0, "pe_table": table})
    assert torch.equal(model.head.weight, weights["model.generator.weight"])


def test_keys_without_prefix(weights, table):
    plain = {key.removeprefix("model."): value for key, value in weights.items()}
    both = [from_official("oat", some, config=CASE.config | {"pe_table": table}) for some in (weights, plain)]
    for name, tensor in both[0].state_dict().items():
        assert torch.equal(tensor, both[1].state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pe_table": None}, "do not contain the position table"),
        ({"pe_table": None, "PE_path": "missing.npy"}, "no position table missing.npy"),
        ({"pe_table": torch.zeros(3, 5)}, "need .3, 4."),
        ({"functionChoice": "original_update"}, "original_update"),
        ({"CA_version": 2}, "CA_version must be 0 .* got 2"),
        ({"emb_size": 32}, "emb_size=24, but the configuration says 32"),
        ({"changeX": "True"}, "changeX"),
        ({"CA_heads": 2}, "CA_heads"),
    ],
)
def test_what_does_not_fit(weights, table, change, message):
    with pytest.raises(ConversionError, match=message):
        from_official("oat", weights, config=CASE.config | {"pe_table": table} | change)


def test_grid_is_needed_unless_it_is_a_published_one(weights, table):
    config = {key: value for key, value in CASE.config.items() if key not in ("rows", "cols")}
    with pytest.raises(ConversionError, match="pass `rows` and `cols`"):
        from_official("oat", weights, config=config | {"pe_table": table})


def test_left_over_and_missing_keys(weights, table):
    config = CASE.config | {"pe_table": table}
    with pytest.raises(ConversionError, match=r"extra\.weight"):
        from_official("oat", weights | {"model.extra.weight": torch.zeros(1)}, config=config)
    del weights["model.transformer_decoder.layers.1.norm3.bias"]
    with pytest.raises(ConversionError, match=r"final_layer_norm\.bias"):
        from_official("oat", weights, config=config)
