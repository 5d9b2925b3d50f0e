"""Official checkpoints: complete, filled and pruned ones, of LLaVA and Qwen2.5-VL."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError, OfficialArguments, StateDict
from hf_attn.cli import main
from hf_attn.modeling.sd_rpn.configuration_sd_rpn import SdRpnConfig
from hf_attn.modeling.sd_rpn.convert_sd_rpn import convert_official
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from tests.goldens.case import Case

from .test_modeling_sd_rpn import inputs_for


GOLDENS = Path(__file__).parents[2] / "goldens" / "sd_rpn"


@pytest.fixture(scope="module", params=["rpn_head_llava", "rpn_head_qwen"])
def case(request):
    return Case(GOLDENS / request.param)


def pruned(case: Case) -> dict[str, torch.Tensor]:
    """Layers 0 .. K+T-1 only, no final norm and no head."""
    last = case.config["twig_K"] + case.config["twig_T"]
    dropped = {"model.norm.weight", "lm_head.weight"}
    dropped |= {name for name in case.weights if name.startswith("model.layers.") and int(name.split(".")[2]) >= last}
    assert len(dropped) > 2
    return {name: tensor for name, tensor in case.weights.items() if name not in dropped}


def test_the_network_does_not_depend_on_the_other_tensors(case, tmp_path):
    complete = from_official("sd_rpn", case.weights, config=case.config)
    alone = {name: tensor for name, tensor in case.weights.items() if "twig" in name}
    from_official("sd_rpn", pruned(case), config=case.config).save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    for other in (from_official("sd_rpn", alone, config=case.config), reloaded):
        assert type(other) is SdRpnModel
        fields = SdRpnConfig.__annotations__
        assert {name: getattr(other.config, name) for name in fields} == {
            name: getattr(complete.config, name) for name in fields
        }
        for name, tensor in complete.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
    inputs = inputs_for(complete.config)
    assert torch.equal(reloaded(**inputs).logits, complete(**inputs).logits)


def test_it_ships_the_network_alone(case):
    model = from_official("sd_rpn", case.weights, config=case.config)
    own = {name for name in case.weights if name.startswith(("model.twig_layers", "model.twig_norm"))}
    assert len(model.state_dict()) == len(own)
    assert model.config.base_num_hidden_layers == case.config["num_hidden_layers"]
    assert (model.config.use_rope, model.config.use_norm) == (
        (True, False) if "vision_config" in case.config else (False, True)
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"model.twig_{name}" for name in trainable} == set(case.info["params_with_gradient"])


@pytest.fixture
def shards(case, tmp_path) -> Path:
    """A folder as on the Hub: the network in the second file, the rest of the base in the first."""
    parts = {
        f"model-0000{number}-of-00002.safetensors": {
            name: tensor for name, tensor in case.weights.items() if ("twig" in name) == (number == 2)
        }
        for number in (1, 2)
    }
    folder = tmp_path / "official"
    folder.mkdir()
    for shard, tensors in parts.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(case.config))
    return folder


def convert(checkpoint: Path, output: Path) -> int:
    return main(["convert", "sd_rpn", str(checkpoint), "--output", str(output)])


def test_a_sharded_checkpoint_is_converted_by_command(case, shards, tmp_path):
    expected = from_official("sd_rpn", case.weights, config=case.config).state_dict()
    # No tensor of the base is needed.
    (shards / "model-00001-of-00002.safetensors").unlink()
    for number, checkpoint in enumerate((shards, shards / "model.safetensors.index.json")):
        assert convert(checkpoint, tmp_path / f"rpn{number}") == 0
        state = AutoModel.from_pretrained(tmp_path / f"rpn{number}").state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_shard_with_the_network_has_to_be_there(shards, tmp_path, capsys):
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert convert(shards, tmp_path / "rpn") == 2
    error = capsys.readouterr().err
    assert "is in model-00002-of-00002.safetensors, but this file is not in" in error and "Download it" in error
    assert not (tmp_path / "rpn").exists()


def official_shapes(config: SdRpnConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state = SdRpnModel(config).state_dict()
    return {f"model.twig_{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("variant", SdRpnConfig.variants)
def test_published_checkpoints_need_no_configuration(variant):
    config = SdRpnConfig.from_variant(variant)
    converted = convert_official(StateDict(official_shapes(config)), OfficialArguments({}))
    assert converted.config.to_dict() == config.to_dict()


def test_a_base_without_a_network_is_refused(case):
    base = {name: tensor for name, tensor in case.weights.items() if "twig" not in name}
    with pytest.raises(ConversionError, match=r"no model\.twig_layers"):
        from_official("sd_rpn", base, config=case.config)


def test_what_is_left_over_or_missing_is_named(case):
    with pytest.raises(ConversionError, match=r"does not use: model\.detector\.weight"):
        from_official("sd_rpn", {**case.weights, "model.detector.weight": torch.zeros(1)}, config=case.config)
    name = "model.twig_layers.1.mlp.down_proj.weight"
    with pytest.raises(ConversionError, match=r"no weights for layers\.1\.mlp\.down_proj\.weight"):
        from_official("sd_rpn", {key: value for key, value in case.weights.items() if key != name}, config=case.config)
    with pytest.raises(ConversionError, match="has no 'twig_K', which the converter needs"):
        from_official("sd_rpn", case.weights, config={k: v for k, v in case.config.items() if k != "twig_K"})


@pytest.mark.parametrize("option", [{"roi_loss": "mse"}, {"roi_source": "hidden"}, {"roi_super_type": "v2"}])
def test_maps_of_another_kind_are_refused(case, option):
    (name,) = option
    with pytest.raises(ConversionError, match=f"trained with {name}="):
        from_official("sd_rpn", case.weights, config={**case.config, **option})


def test_a_single_head_map_is_served(case):
    assert (
        from_official("sd_rpn", case.weights, config={**case.config, "roi_multi_head": False}).config.multi_head
        is False
    )
