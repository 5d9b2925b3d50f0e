"""Choice of the implementation of a call, and the record of verified GPU kernels."""

import json
from dataclasses import dataclass

import pytest
import torch

from hf_attn.attention import AttentionCall, AttentionFunction, Implementation, Refusal
from hf_attn.attention.landmark import LANDMARK, LandmarkCall
from hf_attn.attention.sigmoid import SIGMOID, SigmoidCall
from hf_attn.kernels import gpu_record
from hf_attn.kernels.landmark import call as landmark_call


@dataclass
class Stub:
    """The attributes of a tensor that the dispatcher uses; no GPU is needed."""

    device: torch.device
    dtype: torch.dtype = torch.float16


@dataclass
class StubCall:
    query: Stub


CALL = StubCall(Stub(torch.device("cuda", 0)))
FUNCTION = AttentionFunction(
    "stub",
    (
        Implementation("triton", lambda call, found: ("triton", found), lambda call: "found", gpu_kernel=True),
        Implementation("torch", lambda call, found: ("torch", found), lambda call: Refusal("it does not like it")),
        Implementation("eager", lambda call, found: ("eager", found)),
    ),
)


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"Fake {index}")
    gpu_record.passed_kernels.cache_clear()
    yield
    gpu_record.passed_kernels.cache_clear()


def test_a_kernel_without_a_record_is_not_taken_by_itself():
    assert FUNCTION(CALL) == ("eager", None)
    assert FUNCTION(CALL, "auto") == ("eager", None)


def test_a_pinned_kernel_is_always_taken_and_gets_what_its_check_found():
    assert FUNCTION(CALL, "triton") == ("triton", "found")


def test_a_recorded_kernel_is_taken_on_its_device_and_in_its_dtypes():
    gpu_record.write_record("Fake 0", {"stub_triton": ["float16"]})
    assert FUNCTION(CALL) == ("triton", "found")
    assert FUNCTION(StubCall(Stub(torch.device("cuda", 0), torch.bfloat16))) == ("eager", None)
    assert FUNCTION(StubCall(Stub(torch.device("cuda", 1)))) == ("eager", None)
    assert FUNCTION(StubCall(Stub(torch.device("cpu")))) == ("eager", None)


def test_a_record_does_not_outlive_the_versions_that_it_was_made_with(monkeypatch):
    gpu_record.write_record("Fake 0", {"stub_triton": ["float16"]})
    monkeypatch.setattr(torch, "__version__", "99.0")
    gpu_record.passed_kernels.cache_clear()
    assert FUNCTION(CALL) == ("eager", None)


def test_a_new_record_replaces_that_of_its_device_only():
    gpu_record.write_record("Fake 0", {"stub_triton": ["float16"]})
    gpu_record.write_record("Fake 1", {"stub_triton": ["float16"]})
    file = gpu_record.write_record("Fake 0", {})
    assert FUNCTION(CALL) == ("eager", None)
    assert FUNCTION(StubCall(Stub(torch.device("cuda", 1)))) == ("triton", "found")
    assert len(json.loads(file.read_text())) == 2 and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_record_counts_for_nothing(content):
    gpu_record.record_file().write_text(content)
    assert FUNCTION(CALL) == ("eager", None)
    gpu_record.write_record("Fake 0", {"stub_triton": ["float16"]})
    assert FUNCTION(CALL) == ("triton", "found")


def test_the_record_is_read_within_a_compiled_graph():
    gpu_record.write_record("Fake 0", {"stub_triton": ["float16"]})

    def function(x):
        return x + 1 if gpu_record.is_proven("stub_triton", torch.device("cuda", 0), torch.float16) else x

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


def test_a_pinned_implementation_that_refuses_says_why():
    with pytest.raises(ValueError, match=r"'torch' does not support this call: it does not like it\. Use .*'auto'"):
        FUNCTION(CALL, "torch")
    with pytest.raises(ValueError, match=r"stub attention has no implementation 'fast'\. Use one of 'auto', 'triton'"):
        FUNCTION(CALL, "fast")


def test_the_automatic_name_takes_the_fused_path_unless_the_call_needs_the_weights():
    query = torch.randn(1, 2, 6, 8)
    assert SIGMOID.choose(SigmoidCall(query, query, query))[0].name == "torch"
    assert SIGMOID.choose(SigmoidCall(query, query, query, output_weights=True))[0].name == "eager"
    assert LANDMARK.choose(LandmarkCall(query, query, query, is_causal=True))[0].name == "torch"
    assert LANDMARK.choose(LandmarkCall(query, query, query))[0].name == "eager"


def test_landmarks_are_looked_for_once_in_a_call(monkeypatch):
    looked = []
    original = landmark_call.landmark_block_size
    monkeypatch.setattr(landmark_call, "landmark_block_size", lambda *a: looked.append(1) or original(*a))
    query = torch.randn(1, 2, 32, 8)
    is_landmark = (torch.arange(32) % 16 == 15)[None]
    call = LandmarkCall(query, query, query, is_landmark=is_landmark, is_causal=True)
    LANDMARK(call)
    assert len(looked) == 1


def test_a_call_scales_by_the_head_dimension_unless_told_otherwise():
    query = torch.zeros(1, 1, 1, 64)
    assert AttentionCall(query, query, query).scaling == 0.125
    assert AttentionCall(query, query, query, scaling=1.0).scaling == 1.0
