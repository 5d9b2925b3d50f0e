"""Transcripts, tables, splits, batches and features."""

import numpy as np
import pytest
import torch

from hf_attn.examples.synthetic_speech import synthetic_recordings
from hf_attn.modeling.dementia_fusion.audio import read_speech
from hf_attn.modeling.dementia_fusion.data import (
    Recording,
    SpeechCollator,
    SpeechDataset,
    read_table,
    split_by_speaker,
)
from hf_attn.modeling.dementia_fusion.processing_dementia_fusion import SpeechImageFeatureExtractor
from hf_attn.modeling.dementia_fusion.transcripts import read_chat
from tests.modeling.dementia_fusion.tiny import processor, speech


CHAT = """@UTF8
@Begin
@Participants:\tPAR Participant, INV Investigator
*INV:\ttell me everything you see going on .
*PAR:\t&-uh well <the boy> [//] the boy is takin(g) cookies
\tfrom the jar [+ gram] . \x1512_3450\x15
%mor:\tco|well det|the n|boy
*PAR:\txxx (.) mother's &=laughs drying dishes +...
@End
"""


def test_chat_becomes_the_participants_words():
    text = read_chat(CHAT)
    assert text == "uh well the boy the boy is taking cookies from the jar. mother's drying dishes"
    assert read_chat(CHAT, "INV") == "tell me everything you see going on."
    with pytest.raises(ValueError, match="Its speakers: INV, PAR"):
        read_chat(CHAT, "DOC")


def write_table(tmp_path, rows: list[str], header: str = "audio,label,speaker,text,transcript"):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", speech(), 16000)
    (tmp_path / "a.cha").write_text(CHAT, encoding="utf-8")
    table = tmp_path / "table.csv"
    table.write_text("\n".join([header, *rows]), encoding="utf-8")
    return table


def test_tables(tmp_path):
    rows = ["a.wav,ad,s1,a boy,", "a.wav,Control,s2,,a.cha"]
    recordings, classes = read_table(write_table(tmp_path, rows))
    assert classes == ["Control", "ad"]
    assert [(one.text[:7], one.label, one.speaker) for one in recordings] == [("a boy", 1, "s1"), ("uh well", 0, "s2")]


@pytest.mark.parametrize(
    ("rows", "header", "problem"),
    [
        (["a.wav,ad,a boy"], "audio,label,text", "needs the columns"),
        (["a.wav,ad,s1,a boy,"], None, "only one class"),
        (["a.wav,ad,s1,a boy,", "b.wav,cc,s1,a boy,"], None, "line 3: there is no file b.wav"),
        (["a.wav,ad,s1,a boy,", "a.wav,cc,,a boy,"], None, "line 3: speaker is empty"),
        (["a.wav,ad,s1,a boy,", "a.wav,cc,s2,,"], None, "neither a text nor a transcript"),
        ([], None, "no rows"),
    ],
)
def test_bad_tables(tmp_path, rows, header, problem):
    table = write_table(tmp_path, rows, *([header] if header else []))
    with pytest.raises(ValueError, match=problem):
        read_table(table)


def made_up(number: int = 20) -> list[Recording]:
    return [
        Recording({"array": one.samples, "sampling_rate": 16000}, one.text, one.label, one.speaker)
        for one in synthetic_recordings(number, seconds=0.5)
    ]


def test_parts_share_no_speaker():
    parts = split_by_speaker(made_up(), seed=1)
    speakers = [{recording.speaker for recording in part} for part in parts]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20
    assert all({recording.label for recording in part} == {0, 1} for part in parts)
    with pytest.raises(ValueError, match="too few"):
        split_by_speaker([*made_up()[:2], Recording(None, "a", 2, "x")])
    with pytest.raises(ValueError, match="several classes"):
        split_by_speaker([Recording(None, "a", 0, "x"), Recording(None, "a", 1, "x")])


def test_a_batch_without_one_modality():
    dataset = SpeechDataset(
        [
            Recording({"array": speech(seed=i), "sampling_rate": 16000}, text, i, str(i))
            for i, text in enumerate(["a boy", "water"])
        ],
        processor(),
    )
    items = [dataset[0], dataset[1]]
    both, text, audio = (SpeechCollator(processor(), name)(items) for name in ("both", "text", "audio"))
    assert both["input_ids"].tolist() == [[2, 6, 7, 3], [2, 13, 3, 0]] and both["labels"].tolist() == [0, 1]
    assert torch.equal(text["input_ids"], both["input_ids"]) and not text["pixel_values"].any()
    assert torch.equal(audio["pixel_values"], both["pixel_values"]) and audio["input_ids"].tolist() == [[2, 3]] * 2


def test_the_class_of_made_up_recordings_needs_both():
    recordings = synthetic_recordings(300, each=1, seconds=0.2)
    labels = np.array([one.label for one in recordings])
    silence = np.array([(np.abs(one.samples) < 0.01).mean() for one in recordings])
    empty = np.array(
        [
            sum(
                word in ("uh", "um", "thing", "that", "there", "something", "you", "know") for word in one.text.split()
            )
            for one in recordings
        ]
    )
    alone = [((value > np.median(value)) == labels).mean() for value in (silence, empty)]
    together = (
        (silence / silence.std() + empty / empty.std() > np.median(silence / silence.std() + empty / empty.std()))
        == labels
    ).mean()
    assert all(0.65 < share < 0.85 for share in alone) and together > max(alone) + 0.08


def test_resampling_keeps_a_tone():
    rate = 44100
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    samples = read_speech({"array": tone, "sampling_rate": rate}, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(samples) == 16000
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=2e-3)
    whole = read_speech((tone * 32767).astype(np.int16), 16000, own_rate=rate)
    np.testing.assert_allclose(whole, samples, atol=1e-3)


def test_channels_are_mixed_on_request():
    stereo = np.stack([speech(), speech(seed=1)])
    with pytest.raises(ValueError, match="2 channels"):
        read_speech(stereo, 16000, 16000)
    np.testing.assert_allclose(read_speech(stereo, 16000, 16000, mix_channels=True), stereo.mean(0))
    with pytest.raises(ValueError, match=r"\(channels, samples\)"):
        read_speech(stereo.T, 16000, 16000)


def test_the_image_is_normalised_per_recording():
    extractor = SpeechImageFeatureExtractor(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    images = extractor([speech(3.0), 0.01 * speech(3.0)], sampling_rate=16000)["pixel_values"]
    assert images.shape == (2, 3, 224, 224) and images.min() == 0 and images.max() == 1
    # Decibels are relative to the maximum, so loudness does not matter.
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=0)


def test_the_shortest_recording_has_the_frames_of_a_derivative():
    extractor = SpeechImageFeatureExtractor()
    samples = speech()[: 8 * 512]
    assert extractor.channels(samples).shape == (3, 224, 9)
    with pytest.raises(ValueError, match="At least 4096"):
        extractor.channels(samples[:-1])
    for fields in ({"delta_width": 4}, {"size": {"width": 3}}, {"hop_length": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SpeechImageFeatureExtractor(**fields)
