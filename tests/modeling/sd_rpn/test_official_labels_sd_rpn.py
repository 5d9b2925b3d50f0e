"""The official pickles are converted to a dataset, and no code in them is run."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from hf_attn.modeling.sd_rpn.labels.dataset import official_labels
from hf_attn.modeling.sd_rpn.labels.plain_pickle import PlainPickleError, _ArrayClass, load_plain_pickle
from hf_attn.modeling.sd_rpn.labels.rule import llava_pseudo_labels, qwen_pseudo_labels


def write(path, content, protocol=4) -> str:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_out_as_it_went_in(tmp_path, protocol):
    shared = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = {
        "text": "ä",
        "bytes": b"\xff\x00",
        "numbers": [1, -(2**70), 2.5, True, None, (3, {})],
        "arrays": [shared, shared, np.asfortranarray(np.eye(3)[:, :2]), np.array([True, False])],
        "big_endian": np.arange(3, dtype=">i4"),
        7: np.float32(0.5),
    }
    found = load_plain_pickle(write(tmp_path / "a.pkl", content, protocol))
    assert found.keys() == content.keys()
    assert found["numbers"] == content["numbers"]
    assert (found["text"], found["bytes"], found[7]) == ("ä", b"\xff\x00", 0.5)
    for array, expected in zip(
        [*found["arrays"], found["big_endian"]], [*content["arrays"], content["big_endian"]], strict=True
    ):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert found["arrays"][0].flags.writeable


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def itself():
    value = []
    value.append(value)
    return value


#: calls a class of NumPy that the reader lets through, and sets an attribute of it
SETS_AN_ATTRIBUTE = b"\x80\x02cnumpy\nndarray\nN}X\x01\x00\x00\x00xK\x01s\x86b."
#: an array of 2**40 numbers in eight bytes
TOO_LARGE = pickle.dumps(np.zeros(1), 4).replace(b"K\x01\x85", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85")
MANY_TIMES = (
    b"\x80\x02c_codecs\nencode\nq\x000X\x00\x04\x00\x00"
    + b"a" * 1024
    + b"q\x010X\x06\x00\x00\x00latin1q\x020"
    + b"]("
    + b"h\x00h\x01h\x02\x86R" * 1000
    + b"e."
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda command: Reduced(os.system, command), "refers to (posix|nt).system"),
        (lambda command: [{"deep": (1, [Reduced(os.system, command)])}], "refers to (posix|nt).system"),
        (lambda command: np.array([1, Reduced(os.system, command)], dtype=object), "array of 'O8'"),
        (np.array([1, "a"], dtype=object), "array of 'O8'"),
        (np.array(["abc"]), "array of 'U3'"),
        (np.zeros(2, dtype=[("a", "f4")]), "array of 'V4'"),
        (np.ma.array([1.0], mask=[True]), r"refers to numpy\.ma"),
        (Reduced(eval, "1 + 1"), "refers to builtins.eval"),
        (torch.zeros(2), r"refers to torch"),
        ({1, 2}, "object of the type set"),
        ({(1, 2): 3}, "keys are neither"),
        (itself(), "contains itself"),
        (SETS_AN_ATTRIBUTE, "bad.pkl"),
        (TOO_LARGE, "bytes do not fit"),
        (pickle.dumps([1.5] * 9)[:-9], "bad.pkl"),
        # An unpickler would allocate 64 GB and 8 TB for these.
        (b"\x80\x02]r\xff\xff\xff\xff.", "memoises object 4294967295 after 0"),
        (b"\x80\x04\x95" + (2**43).to_bytes(8, "little") + b"].", "declares more data than it contains"),
        # 1 kB of text, repeated a thousand times
        (MANY_TIMES, "creates more data than it contains"),
        (b"PK\x03\x04 no pickle", "bad.pkl"),
        (b"", "exhausted before seeing STOP"),
    ],
)
def test_anything_else_is_refused(tmp_path, content, message):
    marker = tmp_path / "marker"
    if callable(content):
        content = content(f"touch {marker}")
    path = write(tmp_path / "bad.pkl", content)
    with pytest.raises(PlainPickleError, match=message) as error:
        load_plain_pickle(path)
    assert "bad.pkl cannot be read" in str(error.value)
    assert not marker.exists()
    assert not hasattr(_ArrayClass, "x")


def test_the_attack_works_on_a_plain_unpickler(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Reduced(os.system, f"touch {marker}")))
    assert marker.exists()


@pytest.fixture
def images(tmp_path):
    (tmp_path / "gqa").mkdir()
    for name, size in (("a.png", (60, 40)), ("b.png", (30, 50))):
        Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "gqa" / name)
    return tmp_path


def records(shape):
    rng = np.random.default_rng(0)
    return [
        {
            "question_id": str(i),
            "prompt": "Where?",
            "text": "There.",
            "image": f"gqa/{name}.png",
            "sink_attn": rng.uniform(0, 2e-3, shape).astype(np.float16),
            "grounding_attn_o2i": rng.uniform(0, 0.02, shape).astype(np.float16) ** 8,
        }
        for i, name in enumerate("ab")
    ]


def test_llavas_maps_become_a_data_set(images):
    content = records((36,))
    dataset = official_labels(write(images / "7b.pkl", content), images)
    assert dataset.column_names == ["image", "question", "answer", "roi_labels", "grounding", "sink"]
    assert [image.size for image in dataset["image"]] == [(60, 40), (30, 50)]
    assert dataset[1]["question"] == "Where?"
    grounding, sink = (
        torch.stack([torch.from_numpy(record[name]).view(6, 6) for record in content])
        for name in ("grounding_attn_o2i", "sink_attn")
    )
    assert torch.equal(torch.tensor(dataset["roi_labels"]), llava_pseudo_labels(grounding, sink).labels)
    torch.testing.assert_close(torch.tensor(dataset["grounding"]), grounding.float(), atol=0, rtol=0)


def test_qwens_maps_become_a_data_set_and_know_their_padding(images):
    content = records((6, 6))
    for record in content:
        record["grounding_attn_o2i"] = np.zeros((6, 6))
        record["grounding_attn_o2i"][2, 3] = 0.1
    dataset = official_labels(write(images / "q.pkl", content), images, rule="qwen", sink_threshold=1e-2)
    grounding, sink = (
        torch.stack([torch.from_numpy(record[name]) for record in content])
        for name in ("grounding_attn_o2i", "sink_attn")
    )
    expected = qwen_pseudo_labels(grounding, sink, [(60, 40), (30, 50)]).labels
    assert torch.equal(torch.tensor(dataset["roi_labels"]), expected)
    assert (expected == 1).sum() == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda content: {"a": 1}, ValueError, "does not contain a list"),
        (lambda content: [content[0], {"image": "x"}], ValueError, "Entry 1 of .* lacks prompt, text, sink_attn"),
        (
            lambda content: [{**content[0], "image": "gqa/c.png"}],
            FileNotFoundError,
            "The image of entry 0, gqa/c.png, is not in",
        ),
        (lambda content: [{**content[0], "sink_attn": np.zeros(35)}], ValueError, "35 cells is not square"),
    ],
)
def test_other_plain_data(images, change, error, message):
    path = write(images / "x.pkl", change(records((36,))))
    with pytest.raises(error, match=message):
        official_labels(path, images)


def test_no_such_rule(images):
    with pytest.raises(ValueError, match="rule must be 'llava' or 'qwen'"):
        official_labels(write(images / "x.pkl", records((36,))), images, rule="vit")
