"""Conversion of official checkpoints: all tensors are used, all parameters are set, no code is run, all file layouts."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from hf_attn.catalog import PAPERS
from hf_attn.checkpoints.files import open_checkpoint, read_checkpoint
from hf_attn.checkpoints.official import (
    ConversionError,
    StateDict,
    from_official,
    load_strict,
    select_state_dict,
)
from tests.batteries.official import ARGUMENTS, official_state_dict


@pytest.fixture
def state():
    return official_state_dict()


def convert(state_dict_or_path):
    return from_official("echo_att", state_dict_or_path, ARGUMENTS)


def assert_holds(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# --- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_gives_the_same_as_its_state_dict(state, tmp_path, suffix, as_text):
    path = tmp_path / f"official{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model = convert(str(path) if as_text else path)
    assert not model.training
    assert_holds(model, state)


def test_a_legacy_pytorch_file(state, tmp_path):
    torch.save(state, tmp_path / "official.pth", _use_new_zipfile_serialization=False)
    assert_holds(convert(tmp_path / "official.pth"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_weights_is_kept(state, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model = convert(state)
    assert model.dtype == dtype
    assert_holds(model, state)


def test_the_state_dict_of_the_caller_is_left_alone(state):
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = convert(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_parameters_do_not_hold_the_fused_tensor_they_were_cut_from(state):
    cut, transposed = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    state[cut] = torch.stack([state[cut]] * 3)[1]
    state[transposed] = state[transposed].T.contiguous().T
    model = convert(state)
    assert_holds(model, state)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    loaded = load_strict(type(model), model.config, state, "The state dict")
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in loaded.parameters())


# --- dictionaries around the state dict ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params_ema", "params", "state_dict", "model"])
def test_the_entry_that_holds_the_weights_is_found(state, tmp_path, name):
    checkpoint = {
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        name: state,
        "rng_state": torch.zeros(8, dtype=torch.uint8),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert_holds(convert(tmp_path / "checkpoint.pth"), state)
    assert_holds(convert(checkpoint), state)


def test_averaged_weights_are_preferred(state):
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert_holds(convert({"params": raw, "params_ema": state}), state)


def test_the_only_dictionary_of_tensors_is_used_under_any_name(state):
    assert_holds(convert({"net": state, "args": {"lr": 0.1}, "step": 7}), state)


def test_several_dictionaries_of_tensors_are_ambiguous(state):
    with pytest.raises(ConversionError, match=r"unclear which one has the weights: generator, teacher\."):
        select_state_dict({"generator": state, "teacher": state})
    with pytest.raises(ConversionError, match="unclear which one has the weights: teacher, and its top-level entries"):
        select_state_dict({**state, "teacher": state})


def test_counters_beside_the_weights_are_ignored(state):
    assert_holds(convert({**state, "epoch": 3, "version": "1.0", "best": None}), state)


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"model": {}}, {"optimizer": {"param_groups": []}}])
def test_there_must_be_tensors(checkpoint):
    with pytest.raises(ConversionError, match="not a state dict"):
        select_state_dict(checkpoint)


def test_what_is_neither_tensor_nor_plain_is_named(state):
    with pytest.raises(ConversionError, match="extra, which are not tensors"):
        select_state_dict({**state, "extra": [1, 2]})


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_leftover_keys_are_named(state):
    state["model.layers.0.surprise.weight"] = torch.zeros(2)
    with pytest.raises(ConversionError, match=r"no place for model\.layers\.0\.surprise\.weight"):
        convert(state)


def test_missing_keys_are_named(state):
    del state["model.norm.weight"]
    with pytest.raises(ConversionError, match=r"no weights for model\.norm\.weight"):
        convert(state)


def test_wrong_shapes_are_named_with_both_shapes(state):
    state["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight \(\[5\] instead of \[16\]\)"):
        convert(state)


def test_all_problems_are_in_one_error_and_nowhere_else(state, capfd):
    state["surprise"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(5)
    del state["lm_head.weight"], state["model.embed_tokens.weight"]
    with pytest.raises(ConversionError) as error:
        convert(state)
    for part in ("no weights for", "no place for surprise", "other shapes: model.norm.weight"):
        assert part in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_good_conversion_is_quiet_and_leaves_the_progress_bars_on(state, capfd):
    assert logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    convert(state)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == verbosity


def test_a_key_that_the_converter_did_not_take_is_an_error(state, monkeypatch):
    from hf_attn.modeling.echo_att import convert_echo_att

    convert_official = convert_echo_att.convert_official

    def forgetful(official, config):
        converted = convert_official(StateDict(state), config)
        for name in set(official) - {"model.norm.weight"}:
            official[name]
        return converted

    monkeypatch.setattr(convert_echo_att, "convert_official", forgetful)
    with pytest.raises(ConversionError, match=r"keys that echo_att does not use: model\.norm\.weight"):
        convert(state)


def test_a_long_list_of_keys_is_cut(state):
    state.update({f"surprise_{index:02}": torch.zeros(1) for index in range(20)})
    with pytest.raises(ConversionError, match="surprise_11 and 8 more"):
        convert(state)


def test_an_official_argument_that_is_missing_is_named(state):
    with pytest.raises(ConversionError, match="has no 'num_heads'"):
        from_official("echo_att", state, {name: value for name, value in ARGUMENTS.items() if name != "num_heads"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("bias"), "no weights for bias"),
        (lambda state: state.update(more=torch.zeros(1)), "no place for more"),
        (lambda state: state.update(bias=torch.zeros(5)), r"other shapes: bias \(\[5\] instead of \[3\]\)"),
    ],
)
def test_a_plain_module_is_filled_as_strictly(change, problem):
    module = torch.nn.Linear(2, 3)
    config = {"in_features": 2, "out_features": 3}
    state = dict(module.state_dict())
    filled = load_strict(torch.nn.Linear, config, state, "The state dict")
    assert torch.equal(filled.weight, module.weight) and not filled.training
    change(state)
    with pytest.raises(ConversionError, match=problem):
        load_strict(torch.nn.Linear, config, state, "The state dict")


def test_an_unknown_paper_and_a_paper_without_converter(state):
    with pytest.raises(ValueError, match=r"There is no paper 'echoatt' in the catalogue\. Available: .*echo_att"):
        from_official("echoatt", state)
    without = next(paper.slug for paper in PAPERS.values() if not paper.converter)
    with pytest.raises(ValueError, match=f"{without} has no converter .* Papers that have one: .*echo_att"):
        from_official(without, state)


# --- files that are broken, or that contain code ------------------------------------------------------


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(state, tmp_path, legacy):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({**state, "more": Attack(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConversionError, match=r"evil\.pth is refused: .* reference to posix\.mkdir"):
        convert(path)
    assert not trace.exists()


def test_a_whole_module_is_refused_with_the_reason(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ConversionError, match=r"reference to torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -8])
def test_a_truncated_file(state, tmp_path, suffix, kept):
    path = tmp_path / f"official{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)] if isinstance(kept, float) else content[:kept])
    with pytest.raises(ConversionError, match=f"official{suffix} cannot be read: it is corrupt, truncated or"):
        convert(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_another_kind(tmp_path, suffix):
    path = tmp_path / f"official{suffix}"
    path.write_bytes(b"<!doctype html><title>Not found</title>" * 20)
    with pytest.raises(ConversionError, match=f"official{suffix} cannot be read: it is corrupt, truncated or"):
        convert(path)


def test_a_bare_tensor(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ConversionError, match="contains a Tensor, not a dictionary"):
        read_checkpoint(tmp_path / "tensor.pth")


@pytest.mark.parametrize("name", ["missing.pth", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(ConversionError, match="There is no checkpoint file at"):
        convert(tmp_path / name)


# --- shards --------------------------------------------------------------------------------------------------------

INDICES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


def write_shards(state, folder: Path, suffix: str) -> Path:
    """Two files, an index and the configuration; returns the index."""
    names = list(state)
    weight_map = {}
    for number, of_shard in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"part-{number}{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(
            {name: state[name] for name in of_shard}, folder / shard
        )
        weight_map |= dict.fromkeys(of_shard, shard)
    (folder / "config.json").write_text(json.dumps(ARGUMENTS))
    index = folder / INDICES[suffix]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", INDICES)
def test_shards_give_the_same_as_the_state_dict(state, tmp_path, suffix):
    index = write_shards(state, tmp_path, suffix)
    assert_holds(convert(index), state)
    assert_holds(from_official("echo_att", tmp_path), state)
    assert_holds(from_official("echo_att", str(index)), state)


def test_a_folder_with_one_file(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(convert(tmp_path), state)


@pytest.mark.parametrize("suffix", INDICES)
def test_a_shard_that_is_missing_is_named(state, tmp_path, suffix):
    index = write_shards(state, tmp_path, suffix)
    (tmp_path / f"part-2{suffix}").unlink()
    with pytest.raises(ConversionError, match=rf"is in part-2{suffix}, but this file is not in .*Download it"):
        convert(index)


@pytest.mark.parametrize("suffix", INDICES)
def test_a_truncated_shard(state, tmp_path, suffix):
    index = write_shards(state, tmp_path, suffix)
    shard = tmp_path / f"part-2{suffix}"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=f"part-2{suffix} cannot be read: it is corrupt, truncated or"):
        convert(index)


def test_a_shard_that_runs_code_is_refused_and_not_run(state, tmp_path):
    index = write_shards(state, tmp_path, ".bin")
    torch.save({"more": Attack(tmp_path / "trace")}, tmp_path / "part-1.bin")
    with pytest.raises(ConversionError, match=r"part-1\.bin is refused"):
        convert(index)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an index of a sharded checkpoint"),
        ("[]", "is not an index of a sharded checkpoint"),
        ('{"weight_map": {"lm_head.weight": 1}}', "is not an index of a sharded checkpoint"),
        ('{"weight_map": {"lm_head.weight": "../part-1.safetensors"}}', r"not in its folder: \.\./part-1"),
        ('{"weight_map": {"lm_head.weight": "model.safetensors.index.json"}}', r"index\.json cannot be read"),
        ('{"weight_map": {"surprise": "part-1.safetensors"}}', r"surprise is in part-1\.safetensors, but it is not"),
    ],
)
def test_an_index_that_makes_no_sense(state, tmp_path, content, message):
    index = write_shards(state, tmp_path, ".safetensors")
    index.write_text(content)
    with pytest.raises(ConversionError, match=message):
        convert(index)


def test_a_configuration_beside_the_shards_that_is_broken(state, tmp_path):
    write_shards(state, tmp_path, ".safetensors")
    for content, message in (("{", "cannot be read"), ("[]", "must contain a mapping")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConversionError, match=message):
            from_official("echo_att", tmp_path)
    assert_holds(convert(tmp_path), state)


def test_a_tensor_is_read_on_access(state, tmp_path):
    """The other file need not exist."""
    index = write_shards(state, tmp_path, ".safetensors")
    (tmp_path / "part-2.safetensors").unlink()
    tensors = open_checkpoint(index)
    assert list(tensors) == list(state) and len(tensors) == len(state)
    first, *_, last = state
    assert torch.equal(tensors[first], state[first])
    assert last in tensors
    with pytest.raises(ConversionError, match=r"part-2\.safetensors"):
        tensors[last]


@pytest.mark.parametrize("average", ["params_ema", "model_ema", "state_dict_ema"])
def test_averaged_weights_come_first_and_can_be_declined(average):
    plain = "state_dict" if average.startswith("state") else average.removesuffix("_ema")
    checkpoint = {plain: {"weight": torch.zeros(1)}, average: {"weight": torch.ones(1)}, "epoch": 3}
    assert select_state_dict(checkpoint)["weight"] == 1
    assert select_state_dict(checkpoint, entry=plain)["weight"] == 0
    with pytest.raises(ConversionError, match=f"no entry 'weights'.*{average}"):
        select_state_dict(checkpoint, entry="weights")


def test_what_wrappers_put_before_every_name_is_removed():
    wrapped = {"module._orig_mod.layer.weight": torch.ones(1), "module._orig_mod.module.bias": torch.ones(1)}
    assert list(select_state_dict(wrapped)) == ["layer.weight", "module.bias"]


def test_a_name_is_not_invented_for_a_converted_model(state):
    assert convert(state).config.name_or_path == ""


def test_a_bare_model_of_a_wrapper_converts_and_a_foreign_one_names_the_prefix(state):
    assert_holds(convert({f"model.{name}": tensor for name, tensor in state.items()}), state)
    with pytest.raises(ConversionError, match=r"All names begin with .model\.."):
        convert({"model.x": torch.ones(1)})
