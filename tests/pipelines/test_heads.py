"""A pipeline refuses weights that were saved without a head, and takes them with one."""

import pytest
from transformers import AutoModel, AutoModelForImageToImage, AutoModelForTimeSeriesPrediction, pipeline

from hf_attn import GMANConfig, HATConfig


FAMILIES = {
    "image-restoration": (AutoModelForImageToImage, HATConfig),
    "traffic-forecasting": (AutoModelForTimeSeriesPrediction, GMANConfig),
}


@pytest.mark.parametrize("task", FAMILIES)
def test_weights_without_a_head(task, tmp_path):
    with_head, config = FAMILIES[task]
    AutoModel.from_config(config.from_variant("tiny")).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"which has no head, so the head of this \w+ would be random. Train it and save"
    ):
        pipeline(task, model=str(tmp_path / "base"), device="cpu")
    # as after a training that starts from the base
    model = with_head.from_pretrained(tmp_path / "base").train()
    model.save_pretrained(tmp_path / "whole")
    for whole in (model, str(tmp_path / "whole")):
        assert not pipeline(task, model=whole, device="cpu").model.training
