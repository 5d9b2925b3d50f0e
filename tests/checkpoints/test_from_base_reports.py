"""The load report of `from_base`: tensors that are accounted for are not reported."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_attn import EchoAttForCausalLM, PathEnsembleForImageClassification


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("family", ["echo_att", "path_ensemble"])
def test_accounted_tensors_are_not_reported_as_newly_initialised(family, tmp_path, caplog, capfd):
    if family == "echo_att":
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path)
    else:
        ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    verbosity = logging.get_verbosity()
    logging.enable_propagation()
    try:
        if family == "echo_att":
            report = EchoAttForCausalLM.from_base(tmp_path, shared_layers=[1]).base_report
            assert report.dropped
        else:
            report = PathEnsembleForImageClassification.from_base(tmp_path, ensemble_scale="channel").base_report
            assert report.new == ("vit.ensemble_scale",)
    finally:
        logging.disable_propagation()
    assert logging.get_verbosity() == verbosity
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err
