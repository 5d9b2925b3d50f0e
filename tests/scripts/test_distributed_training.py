"""scripts/train_long_context.py and scripts/train_zeppelin.py on a tiny base: one process, and two by torchrun and accelerate."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.batteries.scripts import SCRIPTS, loaded_script
from tests.batteries.text import byte_tokenizer, llama


NAMES = ("train_long_context", "train_zeppelin")


@pytest.fixture(params=NAMES)
def script(request):
    with loaded_script(request.param) as module:
        yield module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    byte_tokenizer().save_pretrained(folder)
    llama(num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Documents of very different lengths."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": "All ranks work. " * n} for n in (1, 6, 2, 1, 3, 1, 5, 2) * 3]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(name, base, dataset, output):
    own = {"train_long_context": ["--block_size", "64"], "train_zeppelin": ["--max_length", "90"]}[name]
    return [
        *("--model_name_or_path", str(base), "--dataset_name", str(dataset), "--output_dir", str(output), *own),
        *("--report_to", "none", "--disable_tqdm", "true", "--save_steps", "2"),
        *("--learning_rate", "0.01"),
    ]


def test_one_process_trains_and_goes_on(script, base, dataset, tmp_path, capsys, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    name, output = script.__name__, tmp_path / "out"
    run = arguments(name, base, dataset, output)
    results = script.main([*run, "--max_steps", "2"])
    printed = capsys.readouterr().out
    if name == "train_long_context":
        assert results["loss"] == pytest.approx(results["one_process_loss"], abs=1e-5)
        assert results["bytes_sent"] == results["bytes_by_formula"] == [0]
        assert "in one process" in printed
    else:
        assert results.keys() == {"Zeppelin", "even ring", "padding"}
        assert "idle share of each process" in printed
    assert json.loads((output / "report.json").read_text()) == results
    start, trained = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, output))
    assert any(not start[key].equal(weight) for key, weight in trained.items())
    with pytest.raises(SystemExit, match=r"contains an earlier run\. `--resume_from_checkpoint last` continues it"):
        script.main([*run, "--max_steps", "3"])
    script.main([*run, "--max_steps", "3", "--resume_from_checkpoint", "last", "--report", "false"])
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(SCRIPTS / "configs" / "sequence_parallel_cpu.yaml"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "more"),
    [
        ("train_long_context", TORCHRUN, ["--layout", "ulysses"]),
        ("train_long_context", ACCELERATE, ["--bf16", "true"]),
        ("train_zeppelin", TORCHRUN, []),
    ],
)
def test_two_processes_report_equal_losses_and_bytes(name, launcher, more, base, dataset, tmp_path):
    command = [sys.executable, *launcher, str(SCRIPTS / f"{name}.py")]
    command += [*arguments(name, base, dataset, tmp_path / "out"), "--max_steps", "1", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "report.json").read_text())
    if name == "train_long_context":
        assert results["loss"] == pytest.approx(results["one_process_loss"], abs=1e-5)
        assert results["bytes_sent"] == results["bytes_by_formula"]
        assert len(results["bytes_sent"]) == 2 and min(results["bytes_sent"]) > 0
    else:
        assert all(len(found["step"]) == 2 and min(found["step"]) > 0 for found in results.values())


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("train_long_context", ["--layout", "spiral"], "--layout spiral is not one of ring"),
        ("train_long_context", ["--split", "odd"], "--split must be zigzag or contiguous, got odd"),
        ("train_long_context", ["--train_file", "nowhere"], "pass either --dataset_name or --train_file"),
        ("train_long_context", ["--block_size", "1"], "too short: there must be at least one token to predict"),
        ("train_long_context", ["--resume_from_checkpoint", "last"], "there is no checkpoint in"),
        ("train_long_context", ["--block_size", "999999"], "exceeds the"),
        ("train_zeppelin", ["--max_length", "1"], "too short: there must be at least one token to predict"),
        ("train_zeppelin", ["--num_nodes", "3"], "1 ranks cannot be distributed evenly over 3 nodes"),
        ("train_zeppelin", ["--capacity", "5"], "with a capacity of 5 take at most 5. A capacity of"),
    ],
)
def test_what_does_not_fit_is_told(name, more, message, base, dataset, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with loaded_script(name) as module, pytest.raises(SystemExit, match=message):
        module.main([*arguments(name, base, dataset, tmp_path / "out"), *more])
