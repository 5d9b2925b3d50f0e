"""The `hf-attn` command: what it prints, what it writes, and one line for each mistake."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, pipeline

import hf_attn
from hf_attn.catalog import PAPERS
from hf_attn.cli import main
from hf_attn.examples.assets import AssetError
from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from hf_attn.modeling.sigmoid_attention.modeling_sigmoid_attention import SigmoidCrossAttention
from hf_attn.training.output_folder import OutputFolderError
from tests.batteries.official import ARGUMENTS, official_state_dict


@pytest.fixture
def official(tmp_path):
    """A folder with an official checkpoint of EchoAtt and its arguments."""
    folder = tmp_path / "official"
    folder.mkdir()
    save_file(official_state_dict(), folder / "echo.safetensors")
    (folder / "echo.json").write_text(json.dumps(ARGUMENTS))
    (folder / "echo.yaml").write_text(yaml.safe_dump(ARGUMENTS))
    return folder


def convert(official: Path, output: Path, *more: str, config: str | None = "echo.json", checkpoint="echo.safetensors"):
    arguments = ["convert", "echo_att", str(official / checkpoint), "--output", str(output), *more]
    return main([*arguments, "--config", str(official / config)] if config else arguments)


def assert_one_line_of_error(capsys, *parts: str):
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("hf-attn: error: ") and output.err.count("\n") == 1
    for part in parts:
        assert part in output.err


# --- papers --------------------------------------------------------------------------------------------------------


def test_papers_is_a_table_of_all_papers_with_their_status(capsys):
    assert main(["papers"]) == 0
    header, *rows, _, count = capsys.readouterr().out.splitlines()
    columns = [header.index(name) for name in ("ARXIV", "STATUS", "BECOMES")]
    assert [row.split()[0] for row in rows] == list(PAPERS)
    for row, paper in zip(rows, PAPERS.values(), strict=True):
        cells = [row[start:].split("  ")[0].strip() for start in columns]
        assert cells == [paper.arxiv, "available" if paper.available else "planned", paper.becomes]
    assert count == f"{sum(paper.available for paper in PAPERS.values())} of {len(PAPERS)} papers are available."


def test_papers_as_json_names_classes_that_exist(capsys):
    assert main(["papers", "--json"]) == 0
    papers = json.loads(capsys.readouterr().out)
    assert [paper["slug"] for paper in papers] == list(PAPERS)
    references = [
        reference for paper in papers for models in paper["model_types"].values() for reference in models.values()
    ]
    assert references
    from hf_attn.registration import load

    assert all(isinstance(load(reference), type) for reference in references)
    assert {paper["status"] for paper in papers if paper["model_types"] or paper["attention"]} == {"available"}


def test_listing_papers_does_not_import_torch():
    code = "import sys; from hf_attn.cli import main; main(['papers']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], ["papers"], ["convert"], ["quickstart"], ["compare"], ["claim"], ["analyze-vit"], ["plan"], ["check-gpu"]],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert f"usage: {' '.join(['hf-attn', *command])}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hf-attn {hf_attn.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["paper"], ["convert", "echo_att"], ["quickstart", "--steps", "0"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


# --- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["echo.json", "echo.yaml"])
def test_convert_writes_a_folder_for_the_hub(official, tmp_path, capsys, config):
    output = tmp_path / "made" / "here"
    assert convert(official, output, config=config) == 0
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_hf_attn.py",
    }
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is EchoAttForCausalLM and model.config.shared_layers == [1]
    out = capsys.readouterr().out
    assert f"EchoAttForCausalLM with {model.num_parameters():,} parameters was saved to {output}." in out


@pytest.fixture
def image_command(tmp_path) -> list[str]:
    """Converts an official checkpoint of an image classifier into `tmp_path / "output"`."""
    golden = Path(__file__).parent / "goldens" / "activator" / "geglu_only"
    (tmp_path / "activator.json").write_text(json.dumps(json.loads((golden / "case.json").read_text())["config"]))
    command = [
        "convert",
        "activator",
        str(golden / "weights.safetensors"),
        "--config",
        str(tmp_path / "activator.json"),
    ]
    return [*command, "--output", str(tmp_path / "output")]


def test_an_image_classifier_runs_in_a_pipeline_right_away(image_command, tmp_path):
    assert main(image_command) == 0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    classify = pipeline("image-classification", model=str(tmp_path / "output"))
    # The values of the official evaluation: no crop, normalisation to -1...1.
    size = (classify.model.config.image_size,) * 2
    pixels = torch.tensor(np.asarray(image.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1)
    scores = classify.model(pixels[None] / 127.5 - 1).logits.softmax(-1)
    best, *_ = classify(image)
    assert best["score"] == pytest.approx(scores.max().item(), abs=1e-3)


def test_overwrite_leaves_no_image_processor_of_an_earlier_model(official, image_command, tmp_path):
    assert main(image_command) == 0
    assert convert(official, tmp_path / "output", "--overwrite") == 0
    assert not (tmp_path / "output" / "preprocessor_config.json").exists()


def test_an_image_classifier_needs_torchvision(image_command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    assert main(image_command) == 2
    assert_one_line_of_error(capsys, "pip install 'hf_attn[vision]'")
    assert not (tmp_path / "output").exists()


def test_a_folder_that_is_not_empty_is_left_alone(official, tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("mine")
    assert convert(official, tmp_path / "output") == 2
    assert_one_line_of_error(capsys, "is not empty", "--overwrite")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["mine.txt"]


def test_an_empty_folder_will_do(official, tmp_path):
    (tmp_path / "output").mkdir()
    assert convert(official, tmp_path / "output") == 0


def test_overwrite_leaves_nothing_of_an_earlier_model(official, tmp_path):
    output = tmp_path / "output"
    other = EchoAttConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    EchoAttForCausalLM(other).save_pretrained(output, max_shard_size="1KB")
    (output / "mine.txt").write_text("mine")
    assert convert(official, output, "--overwrite") == 0
    assert [path.name for path in output.glob("*.safetensors*")] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == 31
    assert f"{model.num_parameters():,} parameters" in (output / "README.md").read_text()
    assert (output / "mine.txt").read_text() == "mine"


def test_nothing_is_written_if_the_conversion_fails(official, tmp_path, capsys):
    state = {"model.norm.weight": torch.ones(16)}
    save_file(state, official / "part.safetensors")
    assert convert(official, tmp_path / "output", checkpoint="part.safetensors") == 2
    assert_one_line_of_error(capsys, "part.safetensors does not fit EchoAttForCausalLM", "no weights for")
    assert not (tmp_path / "output").exists()


def test_the_output_must_not_be_a_file(official, capsys):
    assert convert(official, official / "echo.json") == 2
    assert_one_line_of_error(capsys, "is a file")


def test_a_paper_that_is_not_there(official, tmp_path, capsys):
    arguments = ["convert", "nothing", str(official / "echo.safetensors"), "--output", str(tmp_path / "output")]
    assert main(arguments) == 2
    assert_one_line_of_error(capsys, "There is no paper 'nothing' in the catalogue", "echo_att")


def test_a_checkpoint_that_is_not_there(official, tmp_path, capsys):
    assert convert(official, tmp_path / "output", checkpoint="nothing.pth") == 2
    assert_one_line_of_error(capsys, "There is no checkpoint file at", "nothing.pth")


def test_a_checkpoint_that_is_no_checkpoint(official, tmp_path, capsys):
    (official / "page.pth").write_text("<html>")
    assert convert(official, tmp_path / "output", checkpoint="page.pth") == 2
    assert_one_line_of_error(capsys, "page.pth cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "missing.json"),
        ("broken.json", "{", "broken.json cannot be read"),
        ("broken.yaml", "a: [", "broken.yaml cannot be read"),
        ("list.json", "[1, 2]", "must contain a mapping"),
        ("part.json", '{"vocab_size": 31}', "has no 'hidden_size'"),
        ("type.json", json.dumps({**ARGUMENTS, "hidden_size": "16"}), "No echo_att model can be built"),
        (
            "value.json",
            json.dumps({**ARGUMENTS, "shared_layers": [7]}),
            "shared_layers must contain layers between 1 and 2",
        ),
    ],
)
def test_a_config_that_is_wrong(official, tmp_path, capsys, name, content, message):
    if content is not None:
        (official / name).write_text(content)
    assert convert(official, tmp_path / "output", config=name) == 2
    assert_one_line_of_error(capsys, message)


def test_a_config_that_is_needed_and_not_given(official, tmp_path, capsys):
    assert convert(official, tmp_path / "output", config=None) == 2
    assert_one_line_of_error(capsys, "The official configuration has no 'vocab_size'")


def test_a_part_of_a_model_has_no_folder(official, tmp_path, capsys):
    part = SigmoidCrossAttention(8, 8, num_heads=2, sigmoid_bias=-1.0)
    state = {
        "q_proj.weight": part.q_proj.weight.detach(),
        "kv_proj.weight": torch.cat([part.k_proj.weight, part.v_proj.weight]).detach(),
        "v_norm.weight": part.v_norm.weight.detach(),
        "v_norm.bias": part.v_norm.bias.detach(),
        "proj.weight": part.o_proj.weight.detach(),
    }
    save_file(state, official / "cross.safetensors")
    arguments = {"q_dim": 8, "kv_dim": 8, "num_heads": 2, "bias": False, "qk_norm": False, "attn_bias": -1.0}
    (official / "cross.json").write_text(json.dumps(arguments))
    command = ["convert", "sigmoid_attention", str(official / "cross.safetensors")]
    assert main([*command, "--config", str(official / "cross.json"), "--output", str(tmp_path / "output")]) == 2
    assert_one_line_of_error(capsys, "SigmoidCrossAttention", "hf_attn.from_official")
    assert not (tmp_path / "output").exists()


# --- quickstart ----------------------------------------------------------------------------------------------------


def test_quickstart_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    for name, function in (("quickstart", "quickstart"), ("echo_att", "echo_att")):
        record = lambda *arguments, name=name, **options: calls.append((name, arguments, options))  # noqa: E731
        monkeypatch.setitem(sys.modules, f"hf_attn.examples.{name}", SimpleNamespace(**{function: record}))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    assert main(["quickstart", "--steps", "3", "--output", str(tmp_path)]) == 0
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "--example", "echo_att"]) == 0
    assert calls == [
        ("quickstart", (tmp_path,), {"steps": 3}),
        ("quickstart", (Path("outputs/quickstart"),), {}),
        ("echo_att", (Path("outputs/echo_att"),), {}),
    ]


def test_quickstart_takes_these_options():
    from hf_attn.examples.echo_att import echo_att
    from hf_attn.examples.quickstart import quickstart

    for example in (quickstart, echo_att):
        inspect.signature(example).bind(Path("output"), steps=3)


def test_threads_are_told_to_wait_before_torch_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_attn.examples.quickstart", SimpleNamespace(quickstart=lambda output: None))
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        # Set first, so that it is unset again after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert main(["quickstart"]) == 0
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("passive", "0")
    code = "import sys, hf_attn.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_reader_that_has_seen_enough():
    code = "import subprocess, sys\nsys.exit(__import__('hf_attn.cli', fromlist=['main']).main(['papers', '--json']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 0


@pytest.mark.parametrize("error", [AssetError, OutputFolderError, ImportError])
def test_what_stops_the_quickstart_is_one_line(monkeypatch, capsys, error):
    def fail(output):
        raise error("It is not there.\nDo this.")

    monkeypatch.setitem(sys.modules, "hf_attn.examples.quickstart", SimpleNamespace(quickstart=fail))
    assert main(["quickstart"]) == 2
    assert_one_line_of_error(capsys, "It is not there. Do this.")


def test_an_interrupted_quickstart_has_its_own_exit_code(monkeypatch):
    def interrupt(output):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "hf_attn.examples.quickstart", SimpleNamespace(quickstart=interrupt))
    assert main(["quickstart"]) == 130


def test_the_folder_of_the_checkpoint_is_no_output(official, capsys):
    before = {path.name: path.read_bytes() for path in official.iterdir()}
    assert convert(official, official, "--overwrite") == 2
    assert_one_line_of_error(capsys, "is the folder of the official checkpoint")
    assert {path.name: path.read_bytes() for path in official.iterdir()} == before


def test_a_full_disk_leaves_the_earlier_model(official, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    assert convert(official, output) == 0
    weights = (output / "model.safetensors").read_bytes()

    def full(*arguments, **keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_attn.hub.write_model_card", full)
    assert convert(official, output, "--overwrite") == 2
    assert (output / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".part")) == []
