"""The training script of embedders: it learns, resumes, and saves what sentence-transformers loads."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.batteries.text import byte_tokenizer, llama
from tests.kernels.processes import free_port


pytest.importorskip("datasets")
pytest.importorskip("peft")

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_embedding.py"


@pytest.fixture(scope="module")
def main():
    """The script's function, called in this process with anything as arguments."""
    spec = importlib.util.spec_from_file_location("run_embedding", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_embedding"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield lambda *arguments: module.main([*map(str, arguments)])
    del sys.modules["run_embedding"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list:
    """A tiny base, and words whose positive is the word in capitals."""
    folder = tmp_path_factory.mktemp("embedding")
    llama(num_hidden_layers=2).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "data").mkdir()
    words = [left + right for left in "abcdefghijkl" for right in "mnopqrstuvwx"]
    rows = [json.dumps({"query": word, "positive": word.upper()}) for word in words]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    return [
        *("--model_name_or_path", folder / "base", "--dataset_name", folder / "data", "--held_back", 20),
        *("--num_latents", 2, "--num_pooling_heads", 2, "--pooling_head_dim", 4, "--max_length", 8),
        *("--learning_rate", "1e-2", "--lora_rank", 4, "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
    ]


def test_it_learns_resumes_and_saves(main, arguments, tmp_path):
    whole = main(*arguments, "--design", 5, "--max_steps", 40, "--output_dir", tmp_path / "whole", "--save_steps", 20)
    assert whole["after_mrr"] > 1.4 * whole["before_mrr"]
    # The same run, stopped after half its steps.
    part = (*arguments, "--design", 5, "--max_steps", 40, "--output_dir", tmp_path / "part")
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "part" / "checkpoint-20")
    with pytest.raises(SystemExit, match="is not empty"):
        main(*part)
    resumed = main(*part, "--resume_from_checkpoint", "last")
    assert resumed == pytest.approx(whole, abs=1e-4)
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in ("whole", "part"))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "whole" / "modules.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("ab")["input_ids"][-1] == first.config.eos_token_id


def test_two_processes_train_a_design_whose_head_has_one_key(arguments, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    options = (*arguments, "--design", 2, "--max_steps", 2, "--output_dir", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["after_mrr"] != metrics["before_mrr"]
