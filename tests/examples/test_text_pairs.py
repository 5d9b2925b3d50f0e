"""Pairs from Python's documentation."""

from hf_attn.examples.text_pairs import text_pairs


def test_training_and_held_out_pairs_share_no_text():
    train, test = text_pairs("train"), text_pairs("test")
    assert len(train) > 1000
    assert len(test) > 100
    assert {pair.task for pair in test} == {"heading", "neighbour"}
    assert len({pair.topic for pair in test}) > 3
    known = {pair.positive for pair in train}
    assert not known & {pair.positive for pair in test}
    for task in ("heading", "neighbour"):
        positives = [pair.positive for pair in train if pair.task == task]
        assert len(positives) == len(set(positives))
