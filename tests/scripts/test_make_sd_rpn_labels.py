"""scripts/make_sd_rpn_labels.py on a tiny random LLaVA and a tiny random Qwen2.5-VL."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_attn.modeling.sd_rpn.labels.answer_attention import AttentionRecipe, answer_attention
from hf_attn.modeling.sd_rpn.labels.rule import llava_pseudo_labels, padded_cells
from hf_attn.modeling.sd_rpn.training import labelling_inputs
from tests.batteries.scripts import SCRIPTS, loaded_script
from tests.modeling.sd_rpn.tiny import GRID, picture, tiny_base, tiny_processor


SCRIPT = SCRIPTS / "make_sd_rpn_labels.py"
HEADS = ["--grounding_heads", "2:1", "--sink_heads", "1:all", "--rule", "llava", "--sink_threshold", "0.1"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("make_sd_rpn_labels") as module:
        yield module


def save_base(kind: str, folder: Path) -> Path:
    tiny_base(kind).save_pretrained(folder)
    tiny_processor(kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llava", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(("gqa/a.png", "gqa/b.png", "ocr/c.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(60 + 20 * i, 90, seed=i).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def arguments(base, output, *more) -> list[str]:
    common = [
        "--model_name_or_path",
        base,
        "--output_dir",
        output,
        "--max_new_tokens",
        4,
        "--batch_size",
        2,
        "--part_size",
        2,
    ]
    return [*map(str, common), *HEADS, *map(str, more)]


def test_labels_are_those_of_the_bases_own_attention(script, base, images, tmp_path, capsys):
    labelled = script.main(arguments(base, tmp_path / "out", "--image_folder", images, "--question", "What?"))
    usable = sum((np.array(labels) >= 0).any() for labels in labelled["roi_labels"])
    assert usable > 0
    assert f"3 images, {usable} with labels that are not all ignored; " in capsys.readouterr().out
    assert [image.size for image in labelled["image"]] == [(60, 90), (80, 90), (100, 90)]
    assert not (tmp_path / "out" / "parts").exists()

    model, processor = tiny_base("llava"), tiny_processor("llava")
    recipe = AttentionRecipe({2: (1,)}, {1: None}, "llava", 0.1)
    for row in labelled:
        inputs = labelling_inputs(processor, model.config, [row["image"]], ["What?"])
        answer = model.generate(
            **inputs, do_sample=False, max_new_tokens=4, suppress_tokens=[model.config.image_token_id]
        )[0, inputs["input_ids"].shape[1] :]
        assert row["answer"] == processor.decode(answer, skip_special_tokens=True).strip()
        (attention,) = answer_attention(model, inputs, [answer], recipe)
        torch.testing.assert_close(torch.tensor(row["grounding"]), attention.grounding, atol=1e-6, rtol=1e-4)
        expected = llava_pseudo_labels(attention.grounding[None], attention.sink[None], sink_threshold=0.1)
        assert torch.equal(torch.tensor(row["roi_labels"]), expected.labels[0])
        assert expected.labels.shape == (1, GRID, GRID)


def test_sources_are_interchangeable(script, base, images, tmp_path):
    names = ["gqa/a.png", "gqa/b.png"]
    folder = script.main(
        arguments(base, tmp_path / "a", "--image_folder", images, "--question", "What?", "--max_samples", 2)
    )

    rows = [{"image": name, "conversations": [{"from": "human", "value": "<image>\nWhat?"}]} for name in names]
    rows = [{"conversations": []}, *rows, {"image": "ocr/c.png", "question": "Other?"}]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    from_json = ("--json_file", tmp_path / "mix.json", "--image_folder", images, "--max_samples", 2)

    columns = {"picture": [str(images / name) for name in names], "text": ["What?"] * 2}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "data")
    from_data = ("--dataset_name", tmp_path / "data", "--image_column", "picture", "--question_column", "text")

    for i, source in enumerate((from_json, from_data)):
        other = script.main(arguments(base, tmp_path / f"b{i}", *source))
        for column in ("question", "answer", "roi_labels", "grounding", "sink"):
            assert other[column][:] == folder[column][:]


def test_two_processes_share_the_images(script, base, images, tmp_path):
    source = ("--image_folder", images, "--question", "What?", "--part_size", 1)
    alone = script.main(arguments(base, tmp_path / "alone", *source))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, *arguments(base, tmp_path / "two", *source)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The labels were saved to") == 1
    together = datasets.load_from_disk(tmp_path / "two" / "labels")
    for column in ("question", "answer", "roi_labels"):
        assert together[column][:] == alone[column][:]


def test_killed_and_restarted_it_labels_the_rest(script, base, images, tmp_path, monkeypatch):
    source = ("--image_folder", images, "--question", "What?", "--part_size", 1)
    whole = script.main(arguments(base, tmp_path / "whole", *source))
    calls = []

    def killed(*positional, **kwargs):
        calls.append(positional)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return label_images(*positional, **kwargs)

    label_images = script.label_images
    monkeypatch.setattr(script, "label_images", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(base, tmp_path / "part", *source))
    resumed = script.main(arguments(base, tmp_path / "part", *source))
    assert len(calls) == 4
    assert resumed["roi_labels"][:] == whole["roi_labels"][:]
    script.main(arguments(base, tmp_path / "part", *source))
    assert len(calls) == 4


def test_qwens_images_are_padded_to_a_square_of_24_cells(script, images, tmp_path, monkeypatch):
    base = save_base("qwen2_5_vl", tmp_path / "tiny-qwen")
    asked = []

    def label_images(*positional, **kwargs):
        asked.extend(kwargs["asked"])
        return original(*positional, **kwargs)

    original = script.label_images
    monkeypatch.setattr(script, "label_images", label_images)
    options = ["--image_folder", images, "--path_contains", "a.png", "--question", f"What? {script.SHORT_ANSWER}"]
    heads = ["--grounding_heads", "2:0", "--rule", "qwen"]
    command = ["--model_name_or_path", base, "--output_dir", tmp_path / "out", "--max_new_tokens", 3, *options, *heads]
    labelled = script.main([str(word) for word in command])
    assert asked == [f"What? {script.BOX_REQUEST}"]
    assert labelled[0]["question"] == options[-1]
    labels = torch.tensor(labelled[0]["roi_labels"])
    assert labels.shape == (24, 24)
    if (labels >= 0).any():
        assert (labels[padded_cells(60, 90, 24)] == 0).all()
    assert not torch.tensor(labelled[0]["sink"]).any()


def test_official_files_need_no_model(script, images, tmp_path):
    record = {
        "prompt": "What?",
        "text": "That.",
        "image": "gqa/a.png",
        "sink_attn": np.zeros(576, np.float16),
        "grounding_attn_o2i": np.eye(24, dtype=np.float16)[3].repeat(24),
    }
    (tmp_path / "good.pkl").write_bytes(pickle.dumps([record]))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps([record, print]))
    command = ["--model_name_or_path", "llava-hf/llava-1.5-7b-hf", "--image_folder", str(images)]
    good = ["--official_file", str(tmp_path / "good.pkl"), "--output_dir", str(tmp_path / "good")]
    labelled = script.main([*command, *good])
    assert labelled[0]["answer"] == "That."
    assert np.array(labelled[0]["roi_labels"]).sum(1).tolist() == [0] * 3 + [24] + [0] * 20
    with pytest.raises(SystemExit, match=r"bad\.pkl cannot be read: it refers to builtins\.print"):
        script.main([*command, "--official_file", str(tmp_path / "bad.pkl"), "--output_dir", str(tmp_path / "bad")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "exactly one of --dataset_name, --json_file, --official_file, --question"),
        (("--question", "What?", "--dataset_name", "x"), "exactly one of"),
        (("--question", "What?"), "need --image_folder"),
        (
            ("--question", "What?", "--image_folder", "{images}", "--max_samples", 0),
            "--max_samples=0 is out of range: it must be at least 1",
        ),
        (("--dataset_name", "data", "--path_contains", "gqa"), "--path_contains needs --json_file or --question"),
        (("--question", "What?", "--image_folder", "{images}", "--path_contains", "nowhere"), "no images to label"),
        (("--json_file", "{json}", "--image_folder", "{images}"), "entry 0 of .* has neither"),
        (
            ("--question", "What?", "--image_folder", "{images}", "--batch_size", 0),
            "--batch_size=0 is out of range: it must be at least 1",
        ),
        (("--question", "What?", "--image_folder", "{images}", "--max_samples", 0), "--max_samples=0 is out of range"),
        (
            ("--question", "What?", "--image_folder", "{images}", "--sink_heads", "2:x"),
            "'2:x' is not a layer with heads",
        ),
    ],
)
def test_arguments_that_are_wrong(script, base, images, tmp_path, more, message):
    (tmp_path / "a.json").write_text('[{"image": "gqa/a.png"}]')
    more = [str(word).format(images=images, json=tmp_path / "a.json") for word in more]
    with pytest.raises(SystemExit, match=message):
        script.main(arguments(base, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_an_unknown_base_needs_heads(script, base, images, tmp_path):
    command = [
        "--model_name_or_path",
        str(base),
        "--output_dir",
        str(tmp_path),
        "--image_folder",
        str(images),
        "--question",
        "What?",
    ]
    with pytest.raises(SystemExit, match=r"No published choice of heads.*llava-1\.5-7b"):
        script.main(command)


def test_what_is_in_the_output_folder_is_not_overwritten_unasked(script, base, images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(SystemExit, match="contains no run of hf_attn"):
            script.main(arguments(base, tmp_path, "--image_folder", images, "--question", "What?", *more))
    assert (tmp_path / "notes.txt").read_text() == "mine"
