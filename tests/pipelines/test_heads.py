"""A pipeline refuses weights that were saved without a head, and accepts weights with one."""

import pytest
from transformers import AutoModel, AutoModelForImageToImage, AutoModelForTimeSeriesPrediction, pipeline

from hf_attn import (
    AutoModelForAudioTextClassification,
    AutoModelForScanpathPrediction,
    DementiaFusionConfig,
    GMANConfig,
    HATConfig,
    OATConfig,
)
from hf_attn.modeling.oat.processing_oat import OATImageProcessor
from tests.modeling.dementia_fusion.tiny import processor


#: task -> class with the head, configuration, further arguments of the pipeline
FAMILIES = {
    "image-restoration": (AutoModelForImageToImage, HATConfig, {}),
    "traffic-forecasting": (AutoModelForTimeSeriesPrediction, GMANConfig, {}),
    "scanpath-prediction": (AutoModelForScanpathPrediction, OATConfig, {"image_processor": OATImageProcessor()}),
    "audio-text-classification": (
        AutoModelForAudioTextClassification,
        DementiaFusionConfig,
        {"processor": processor()},
    ),
}


@pytest.mark.parametrize("task", FAMILIES)
def test_weights_without_a_head(task, tmp_path):
    with_head, config, arguments = FAMILIES[task]
    AutoModel.from_config(config.from_variant("tiny")).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"which has no head, so the head of this \w+ would be random. Train it and save"
    ):
        pipeline(task, model=str(tmp_path / "base"), device="cpu", **arguments)
    # as after a training that starts from the base
    model = with_head.from_pretrained(tmp_path / "base").train()
    model.save_pretrained(tmp_path / "whole")
    for whole in (model, str(tmp_path / "whole")):
        assert not pipeline(task, model=whole, device="cpu", **arguments).model.training
