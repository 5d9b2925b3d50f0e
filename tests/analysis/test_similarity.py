import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from hf_attn.analysis import AttentionSimilarity, attention_similarity


GOLDEN = Path(__file__).parents[1] / "goldens" / "echo_att" / "selection"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, num_key_value_heads=1, initializer_range=0.5, **SIZES)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def token_ids():
    return torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def test_golden_selection():
    case, io = json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "io.safetensors")
    result = AttentionSimilarity.from_maps(io["attn"])
    torch.testing.assert_close(result.similarity, io["similarity"], **case["tolerance"])
    torch.testing.assert_close(result.scores, io["scores"], **case["tolerance"])
    assert result.untouched_ends == tuple(io["prefix_suffix"].tolist())
    blocks = [name for name in io if name.startswith("shared_k")]
    assert blocks
    for name in blocks:
        expected = [layer for layer in io[name].flatten().tolist() if layer >= 0]
        assert result.shared_layers(block_size=int(name.removeprefix("shared_k"))) == expected


def test_equals_the_definition(llama, token_ids):
    result = attention_similarity(llama, token_ids, progress=False)
    llama.set_attn_implementation("eager")
    maps = llama(token_ids, output_attentions=True).attentions
    expected = torch.stack(
        [torch.stack([torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean() for a in maps]) for b in maps]
    )
    torch.testing.assert_close(result.similarity, expected)
    assert torch.equal(result.similarity, result.similarity.T)
    assert torch.equal(result.similarity.diagonal(), torch.ones(4))
    assert result.num_samples == 3


def test_every_form_of_dataset_gives_the_same(llama, token_ids):
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * 12, "labels": ids.tolist()} for ids in token_ids]
    forms = [token_ids, list(token_ids), [token_ids], token_ids.tolist(), rows]
    results = [attention_similarity(llama, form, progress=False).similarity for form in forms]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_rows_of_a_datasets_dataset(llama, token_ids):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf_attn[train]")
    dataset = datasets.Dataset.from_dict({"input_ids": token_ids.tolist()})
    result = attention_similarity(llama, dataset, progress=False)
    torch.testing.assert_close(result.similarity, attention_similarity(llama, token_ids, progress=False).similarity)


def test_implementation_and_mode_are_restored(token_ids):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES)).train()
    model.set_attn_implementation("sdpa")
    attention_similarity(model, token_ids, progress=False)
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    with pytest.raises(ValueError):
        attention_similarity(model, [], progress=False)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


@pytest.mark.parametrize(
    ("model", "samples"),
    [
        (lambda: BertModel(BertConfig(vocab_size=40, **SIZES)), [torch.arange(9)]),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2)), [torch.arange(9)]),
        (
            lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)),
            [{"pixel_values": torch.rand(3, 16, 16)}, {"pixel_values": torch.rand(2, 3, 16, 16)}],
        ),
    ],
    ids=["bert", "gpt2", "vit"],
)
def test_encoders_and_other_decoders(model, samples):
    result = attention_similarity(model(), samples, progress=False)
    assert result.similarity.shape == (4, 4)
    assert result.similarity.isfinite().all()


def test_a_model_without_attention_maps_is_refused(token_ids):
    model = MambaModel(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="MambaModel returns no attention maps"):
        attention_similarity(model, token_ids, progress=False)


def test_bad_samples_are_refused(llama):
    with pytest.raises(ValueError, match="dataset is empty"):
        attention_similarity(llama, [], progress=False)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        attention_similarity(llama, ["text"], progress=False)
    with pytest.raises(ValueError, match="padded"):
        attention_similarity(llama, [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}], progress=False)
    with pytest.raises(ValueError, match=r"token ids, a dictionary.*got float"):
        attention_similarity(llama, [3.5], progress=False)
    with pytest.raises(ValueError, match="shapes differ"):
        AttentionSimilarity.from_maps([[torch.rand(2, 3, 3), torch.rand(1, 3, 3)]])


def scored(*scores):
    """A similarity whose layer scores are in the order of `scores`."""
    values = torch.tensor(scores)
    return AttentionSimilarity((values[:, None] * values).fill_diagonal_(1.0), 1)


def test_an_isolated_low_layer_inside_can_share():
    result = scored(0.1, 0.9, 0.95, 0.12, 0.9, 0.92, 0.11)
    assert result.untouched_ends == (1, 1)
    assert result.shared_layers(block_size=3) == [2, 3, 5]
    assert result.shared_layers(block_size=1) == []


def test_without_a_gap_all_layers_can_share():
    assert AttentionSimilarity(torch.ones(4, 4), 1).untouched_ends == (0, 0)


def test_ranking_and_number_of_shared_layers():
    assert scored(0.99, 0.9, 0.95, 0.2, 0.97).ranking == [4, 2, 1, 3]
    similarity = torch.eye(5)
    for (one, other), value in {(1, 2): 0.9, (2, 3): 0.5, (1, 3): 0.8, (3, 4): 0.7, (0, 1): 0.1}.items():
        similarity[one, other] = similarity[other, one] = value
    result = AttentionSimilarity(similarity, 1)
    assert result.shared_layers(num_shared=0) == []
    assert result.shared_layers(num_shared=1) == [2]
    # Layer 3 then uses the map of layer 1, to which its own map is more similar than to that of layer 2.
    assert result.shared_layers(num_shared=2) == [2, 3]
    assert result.shared_layers(num_shared=4) == [1, 2, 3, 4]
    for arguments in ({}, {"block_size": 2, "num_shared": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            result.shared_layers(**arguments)
    with pytest.raises(ValueError, match="between 0 and 4, got 5"):
        result.shared_layers(num_shared=5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        result.shared_layers(block_size=0)


def test_table_and_plot(tmp_path):
    result = scored(0.1, 0.9, 0.95, 0.9, 0.11)
    lines = str(result).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].endswith("keep its own")
    assert lines[3].endswith("can share")
    result.plot(tmp_path / "map.png", shared_layers=[2, 3])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_texts_are_tokenized_and_cut(llama):
    class Tokenizer:
        def __call__(self, text, truncation, max_length):
            assert truncation
            return {"input_ids": [ord(letter) % 40 for letter in text][:max_length]}

    result = attention_similarity(llama, ["a long text that is cut"], Tokenizer(), max_length=6, progress=False)
    ids = torch.tensor([ord(letter) % 40 for letter in "a long"])
    torch.testing.assert_close(result.similarity, attention_similarity(llama, [ids], progress=False).similarity)


def test_cosines_of_long_sequences_are_exact():
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 1200, 1200).softmax(-1)
    flat = maps.flatten(1).double()
    expected = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0).item()
    similarity = AttentionSimilarity.from_maps([maps]).similarity
    assert similarity[0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert similarity.max() <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: (WhisperEncoder, "input_features", torch.randn(8, 24)),
        lambda: (ViTModel, "pixel_values", torch.randn(3, 8, 8)),
        lambda: (VideoMAEModel, "pixel_values", torch.randn(2, 3, 8, 8)),
        lambda: (LlamaModel, "inputs_embeds", torch.randn(5, 16)),
        lambda: (Wav2Vec2Model, "input_values", torch.randn(400)),
    ],
    ids=["audio features", "image", "video", "embeddings", "waveform"],
)
def test_a_sample_of_any_kind_gets_one_batch_dimension(make):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    configs = {
        WhisperEncoder: WhisperConfig(
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            num_mel_bins=8,
            max_source_positions=12,
        ),
        ViTModel: ViTConfig(**small, image_size=8, patch_size=4),
        VideoMAEModel: VideoMAEConfig(**small, image_size=8, patch_size=4, num_frames=2),
        LlamaModel: LlamaConfig(**small, vocab_size=9),
        Wav2Vec2Model: Wav2Vec2Config(
            **small,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
        ),
    }
    model_class, name, sample = make()
    torch.manual_seed(0)
    model = model_class(configs[model_class]).eval()
    alone = attention_similarity(model, [{name: sample}], progress=False)
    batched = attention_similarity(model, [{name: sample[None]}], progress=False)
    assert alone.num_samples == batched.num_samples == 1
    torch.testing.assert_close(alone.similarity, batched.similarity)


def test_what_has_no_similarity_is_refused(llama, token_ids):
    broken = copy.deepcopy(llama)
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="attention map of layer 1 is not finite"):
        attention_similarity(broken, token_ids, progress=False)
    with pytest.raises(ValueError, match="A sample is empty"):
        attention_similarity(llama, [[]], progress=False)
    with pytest.raises(ValueError, match="An attention map is empty"):
        AttentionSimilarity.from_maps([torch.rand(2, 1, 2, 0, 0)])
