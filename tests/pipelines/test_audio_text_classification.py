"""The pipeline `audio-text-classification`: recordings and transcripts in, probabilities out."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, pipeline, set_seed

from hf_attn import AutoModelForAudioTextClassification, DementiaFusionConfig
from hf_attn.pipelines.audio_text_classification import NOTICE
from tests.batteries.generation import spread_weights
from tests.modeling.dementia_fusion.tiny import processor, speech


RATE = 16000
TEXT = "there is a boy on a stool"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    set_seed(0)
    config = DementiaFusionConfig.from_variant("tiny", id2label={0: "control", 1: "AD"})
    model = spread_weights(AutoModelForAudioTextClassification.from_config(config))
    folder = tmp_path_factory.mktemp("dementia_fusion")
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("audio-text-classification", model=str(folder), device="cpu")


@pytest.fixture
def wav(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(), RATE, subtype="FLOAT")
    return path


def test_probabilities_are_those_of_the_model(pipe):
    result = pipe({"audio": {"array": speech(), "sampling_rate": RATE}, "text": TEXT})
    inputs = pipe.processor(audio=speech(), text=TEXT, sampling_rate=RATE)
    with torch.no_grad():
        expected = pipe.model(**inputs).logits.softmax(-1)[0]
    assert result["probabilities"] == pytest.approx(
        {"control": expected[0].item(), "AD": expected[1].item()}, rel=1e-4
    )
    assert result["score"] == max(result["probabilities"].values())
    assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)
    assert result["transcript"] == TEXT and result["notice"] == NOTICE


def test_the_processor_loads_by_itself(folder):
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "DementiaFusionProcessor"
    assert AutoFeatureExtractor.from_pretrained(folder).size == {"height": 32, "width": 32}


def test_all_kinds_of_recordings_mean_the_same(pipe, wav):
    recordings = [
        str(wav),
        {"array": speech(), "sampling_rate": RATE},
        {"path": str(wav)},
        {"bytes": wav.read_bytes()},
    ]
    results = [pipe(recording, text=TEXT) for recording in recordings]
    results.append(pipe(speech(), text=TEXT, sampling_rate=RATE))
    for result in results[1:]:
        assert result["score"] == pytest.approx(results[0]["score"], rel=1e-6)


def test_several_in_batches_are_those_one_by_one(pipe):
    texts = [TEXT, "water", "a girl on a stool is there a boy"]
    inputs = [
        {"audio": {"array": speech(seed=seed), "sampling_rate": RATE}, "text": text} for seed, text in enumerate(texts)
    ]
    together = pipe(inputs, batch_size=3)
    for result, one in zip(together, inputs, strict=True):
        assert result["transcript"] == one["text"]
        assert result["score"] == pytest.approx(pipe(one)["score"], rel=1e-4)


def test_speech_recognition_makes_missing_transcripts(pipe):
    heard = []

    def asr(recording):
        heard.append(recording)
        return {"text": f" {TEXT} "}

    result = pipe({"array": speech(rate=8000), "sampling_rate": 8000}, asr=asr)
    assert result["transcript"] == TEXT
    assert heard[0]["sampling_rate"] == RATE and len(heard[0]["raw"]) == RATE
    with pytest.raises(ValueError, match="no words"):
        pipe(speech(), sampling_rate=RATE, asr=lambda recording: {"text": " "})
    with pytest.raises(ValueError, match="no transcript"):
        pipe(speech(), sampling_rate=RATE)


def test_a_temperature_flattens_the_probabilities(pipe):
    recording = {"array": speech(), "sampling_rate": RATE}
    hot, cold = (pipe(recording, text=TEXT, temperature=value) for value in (100.0, 0.1))
    assert abs(hot["score"] - 0.5) < 0.1 and cold["score"] > hot["score"] and hot["label"] == cold["label"]
    with pytest.raises(ValueError, match="temperature"):
        pipe(recording, text=TEXT, temperature=0.0)
    with pytest.raises(TypeError, match="tempreature"):
        pipe(recording, text=TEXT, tempreature=1.0)


@pytest.mark.parametrize(
    ("audio", "text", "problem"),
    [
        (np.zeros(RATE, dtype=np.float32), TEXT, "silent"),
        (speech(0.1), TEXT, "too short"),
        (np.stack([speech(), speech()]), TEXT, "2 channels"),
        (np.full(RATE, np.nan, dtype=np.float32), TEXT, "NaN"),
        (np.zeros(0, dtype=np.float32), TEXT, "empty"),
        (np.float32(1e-30) * (np.arange(RATE) == 5), TEXT, "too quiet"),
        (None, TEXT, "no recording"),
        (speech(), [TEXT], "must be a string, got"),
        ({"array": speech(), "sampling_rate": 0.5}, TEXT, "positive integer in Hz, got 0.5"),
        ({"array": speech(), "sampling_rate": "16k"}, TEXT, "positive integer in Hz, got '16k'"),
        ("nowhere.wav", TEXT, "no file"),
        ({"bytes": b"not audio"}, TEXT, "cannot be read as audio"),
        (speech(), " ", "Empty transcripts"),
        (speech(), "boy " * 100, "102 tokens"),
    ],
)
def test_bad_input_is_refused(pipe, audio, text, problem):
    if isinstance(audio, dict) and "bytes" in audio:
        pytest.importorskip("soundfile")
    with pytest.raises(ValueError, match=problem):
        pipe(audio, text=text, sampling_rate=RATE)
    if "tokens" in problem:
        assert pipe(audio, text=text, sampling_rate=RATE, truncation=True)["transcript"] == text


def test_an_array_needs_its_sampling_rate(pipe):
    with pytest.raises(ValueError, match="sampling rate"):
        pipe(speech(), text=TEXT)


def test_the_plot_shows_the_transport_of_each_word(pipe):
    pytest.importorskip("matplotlib")
    figure = pipe.plot({"audio": {"array": speech(), "sampling_rate": RATE}, "text": TEXT})
    spectrogram, words = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert spectrogram.shape[0] == 224 and spectrogram.max() == 0
    assert words.shape == (len(TEXT.split()) + 2, 2)
    np.testing.assert_allclose(words.sum(1), 1, rtol=1e-6)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()][1:3] == ["there", "is"]
