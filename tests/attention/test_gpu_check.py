"""`hf-attn check-gpu` without a GPU: results, record and output.

None of these tests has run on a GPU.
"""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from hf_attn.attention import SIGMOID, AttentionFunction, Implementation, Refusal
from hf_attn.attention.conformance import cases
from hf_attn.attention.gpu_check import check_kernels, measure_speed, record_of, table
from hf_attn.attention.sigmoid import sigmoid_attention_eager
from hf_attn.cli import main
from hf_attn.cli.check_gpu import check
from hf_attn.kernels import gpu_record
from tests.kernels.processes import run_interpreted


CPU = torch.device("cpu")


def function(name: str, compute, check=lambda call: None) -> AttentionFunction:
    kernel = Implementation("triton", compute, check, gpu_kernel=True)
    return AttentionFunction(name, (kernel, SIGMOID.implementations[-1]))


def right(call, found):
    return sigmoid_attention_eager(call)


def wrong_in_float16(call, found):
    output, weights = sigmoid_attention_eager(call)
    return output + 0.1 * (call.query.dtype == torch.float16), weights


def crashing(call, found):
    raise RuntimeError("out of resource: shared memory")


FUNCTIONS = (
    function("right", right),
    function("wrong", wrong_in_float16),
    function("crashing", crashing),
    function("refusing", right, lambda call: Refusal("it does not support this")),
)


def few_cases(_):
    return list(islice(cases(SIGMOID), 6))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path))
    gpu_record.passed_kernels.cache_clear()
    return tmp_path


def test_what_passes_is_recorded():
    results = check_kernels(CPU, 60, FUNCTIONS, few_cases)
    assert record_of(results) == {
        "right_triton": ["float32", "bfloat16", "float16"],
        "wrong_triton": ["float32", "bfloat16"],
        "crashing_triton": [],
        "refusing_triton": [],
    }
    text = table(results)
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines()[: len(results) + 1]}
    assert rows["right_triton", "float16"][2:] == ["passed", "2", "0", "0", "0", "-", "-"]
    assert rows["wrong_triton", "float16"][2:6] == ["FAILED", "0", "0", "2"]
    assert rows["refusing_triton", "float16"][2:6] == ["not", "passed", "0", "2"]
    assert "wrong_triton float16 full-plain: output: error 0." in text
    assert "crashing_triton float32 full-plain: RuntimeError: out of resource: shared memory" in text


def test_a_kernel_that_there_was_no_time_for_has_not_passed():
    results = check_kernels(CPU, 0, FUNCTIONS, few_cases)
    assert record_of(results)["right_triton"] == []
    assert all(result.left == 2 and not result.exact for result in results)


def test_the_command_prints_the_table_and_writes_the_record(capsys, monkeypatch):
    monkeypatch.setattr("hf_attn.attention.gpu_check.measure_speed", lambda result, device: None)
    assert not check(CPU, "Fake GPU", 60, functions=FUNCTIONS, choose_cases=few_cases)
    printed = capsys.readouterr().out
    assert "Fake GPU | torch" in printed and "5 of 12 passed" in printed
    assert gpu_record.passed_kernels("Fake GPU")["wrong_triton"] == ["float32", "bfloat16"]
    assert check(CPU, "Fake GPU", 60, functions=FUNCTIONS[:1], choose_cases=few_cases)
    assert list(gpu_record.passed_kernels("Fake GPU")) == ["right_triton"]


@pytest.mark.parametrize("kernel", ["sigmoid_triton", "landmark_triton", "clear_flex", "window_flex_attention"])
def test_the_speed_of_every_kernel_can_be_measured(kernel, monkeypatch):
    """With the reference implementation in the place of the kernel."""
    from hf_attn.attention import gpu_check

    functions = []
    for original in gpu_check.FUNCTIONS:
        eager = original.implementations[-1]
        implementations = (replace(eager, name=i.name, gpu_kernel=i.gpu_kernel) for i in original.implementations)
        functions.append(replace(original, implementations=tuple(implementations)))
        monkeypatch.setattr(gpu_check, original.name.upper(), functions[-1], raising=False)
    pairs = list(gpu_check.gpu_kernels(functions))
    monkeypatch.setattr(gpu_check, "gpu_kernels", lambda: pairs)
    result = gpu_check.Result(kernel, "float32")
    measure_speed(result, CPU, size=64, repeats=1)
    assert result.over_eager > 0 and result.over_sdpa > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys, cache):
    assert main(["check-gpu"]) == 2
    assert "needs a GPU that the installed PyTorch can use, but found none" in capsys.readouterr().err
    assert not list(cache.iterdir())


def test_in_miniature_under_the_interpreter():
    pytest.importorskip("triton", reason="needs triton (`pip install hf_attn[kernels]`)")
    run_interpreted("tests/attention/interpreted_gpu_check.py")
