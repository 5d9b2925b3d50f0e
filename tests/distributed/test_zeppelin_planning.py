"""Partition, remapping and simulator: properties that hold for every batch."""

import math
import random

import numpy as np
import pytest
from scipy.optimize import linprog

from hf_attn.distributed.zeppelin.cost import BACKWARD, FORWARD, HARDWARE, MODELS, ModelShape, crossover, ring_seconds
from hf_attn.distributed.zeppelin.lengths import DISTRIBUTIONS, read_lengths, sample_lengths
from hf_attn.distributed.zeppelin.partition import Plan, PlanError, partition
from hf_attn.distributed.zeppelin.remap import plan_remap
from hf_attn.distributed.zeppelin.simulate import METHODS, attention_seconds_per_rank, hybrid_micro_batches, simulate


def random_batches(count, seed=0):
    generator = random.Random(seed)
    for _ in range(count):
        nodes, gpus = generator.randint(1, 4), generator.randint(1, 8)
        lengths = [max(1, int(generator.lognormvariate(4, 1.5))) for _ in range(generator.randint(1, 40))]
        slack = generator.choice([1.0, 1.01, 1.1, 1.5, 2.0])
        yield lengths, nodes, gpus, math.ceil(slack * sum(lengths) / (nodes * gpus))


def test_every_token_is_placed_according_to_its_zone():
    seen = set()
    for lengths, nodes, gpus, capacity in random_batches(200):
        plan = partition(lengths, nodes, gpus, capacity)
        for length, zone, shares in zip(lengths, plan.zones, plan.shares, strict=True):
            ranks = [rank for rank, _ in shares]
            assert sum(tokens for _, tokens in shares) == length
            assert ranks == sorted(set(ranks))
            in_nodes = {rank // gpus for rank in ranks}
            if zone == "local":
                assert len(ranks) == 1
            elif zone == "intra":
                assert 2 <= len(ranks) <= gpus and len(in_nodes) == 1
            else:
                assert len(in_nodes) >= 2 and len(ranks) == len(in_nodes) * gpus
        shared = [sum(1 for s in plan.shares if len(s) > 1 and rank in dict(s)) for rank in range(nodes * gpus)]
        for tokens, rings in zip(plan.tokens_per_rank, shared, strict=True):
            assert tokens <= capacity + rings
        seen |= set(plan.zones)
    assert seen == {"local", "intra", "inter"}


def test_the_order_of_a_batch_does_not_matter_for_the_load():
    for lengths, *cluster in random_batches(20, seed=5):
        loads = sorted(partition(lengths, *cluster).tokens_per_rank)
        assert sorted(partition(sorted(lengths), *cluster).tokens_per_rank) == loads


def test_moves_balance_at_the_least_cost():
    generator = random.Random(1)
    for _ in range(25):
        nodes, gpus = generator.randint(1, 3), generator.randint(1, 3)
        ranks = nodes * gpus
        tokens = [generator.randint(0, 30) for _ in range(ranks)]
        remap = plan_remap(tokens, gpus)
        balance = list(tokens)
        for source, destination, count in remap.moves:
            balance[source] -= count
            balance[destination] += count
        assert tuple(balance) == remap.target
        assert max(remap.target) - min(remap.target) <= 1
        costs = [0 if a == b else 1 if a // gpus == b // gpus else 6 for a in range(ranks) for b in range(ranks)]
        rows = [[float(i // ranks == r) for i in range(ranks**2)] for r in range(ranks)]
        columns = [[float(i % ranks == r) for i in range(ranks**2)] for r in range(ranks)]
        best = linprog(costs, A_eq=np.array(rows + columns), b_eq=[*tokens, *remap.target])
        assert remap.cost() == pytest.approx(best.fun, abs=1e-6)


def test_one_gpu_is_the_same_for_all_methods():
    plan = partition([700, 200, 100], 1, 1, 1000)
    assert set(plan.zones) == {"local"}
    seconds = simulate(plan, MODELS["3b"], HARDWARE["a800"])
    assert tuple(seconds) == METHODS
    assert max(seconds.values()) == pytest.approx(min(seconds.values()))


def test_bounds_of_predictions():
    model, hardware = MODELS["3b"], HARDWARE["a800"]
    for lengths, nodes, gpus, capacity in random_batches(60, seed=2):
        plan = partition(lengths, nodes, gpus, capacity)
        seconds = simulate(plan, model, hardware)
        assert seconds["zeppelin"] <= seconds["zeppelin_no_routing"] * (1 + 1e-12)
        remap = plan_remap(plan.tokens_per_rank, gpus)
        assert max(remap.target) <= max(remap.tokens)
        flops = sum(model.attention_flops(length) for length in lengths)
        assert seconds["te_cp"] >= 3.5 * model.layers * flops / (plan.num_ranks * hardware.flops_attn) * (1 - 1e-12)
        for micro_batch in hybrid_micro_batches(lengths, plan.num_ranks, capacity):
            load = [0] * plan.num_ranks
            for length, start, size in micro_batch:
                assert start % size == 0 and start + size <= plan.num_ranks
                for rank in range(start, start + size):
                    load[rank] += math.ceil(length / size)
            assert max(load) <= capacity


def test_transfers_of_the_paper_s_example():
    """One sequence of 64k tokens on 16 ranks of the 3B model; the paper measures 2.18 ms."""
    model, hardware = MODELS["3b"], HARDWARE["a800"]
    size = model.kv_bytes(65536 / 16)
    assert size == 52_428_800
    assert hardware.transfer(size, inter=True) == pytest.approx(2.20e-3, rel=2e-3)
    assert hardware.transfer(size, inter=True, routing=True) == pytest.approx(1.10e-3, rel=1e-2)


@pytest.mark.parametrize(("ranks", "inter"), [(8, False), (16, True)])
def test_at_the_crossover_a_round_computes_as_long_as_it_sends(ranks, inter):
    model, hardware = MODELS["7b"], HARDWARE["a800"]
    length = crossover(model, hardware, ranks, inter)
    compute = model.attention_flops(length) / (ranks**2 * hardware.flops_attn)
    assert hardware.transfer(model.kv_bytes(length / ranks), inter) == pytest.approx(compute)
    for step in (FORWARD, BACKWARD):
        assert ring_seconds(model, hardware, step, length, 1, False, False) == pytest.approx(
            step.attention * model.attention_flops(length) / hardware.flops_attn
        )


def test_idle_time_is_against_the_busiest_rank():
    plan = partition([8, 4], 1, 2, 8)
    busy = attention_seconds_per_rank(plan, MODELS["3b"], HARDWARE["a800"], FORWARD)
    assert busy[0] == pytest.approx(4 * busy[1])
    assert plan.quadratic_load_per_rank == [64.0, 16.0]


def test_a_plan_is_saved_and_read(tmp_path):
    plan = partition([40, 7, 6, 5, 5, 3, 2, 2, 1, 1], 2, 4, 12)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_shape_of_a_model_is_read_from_its_configuration():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2
    )
    assert ModelShape.from_config(config) == ModelShape(hidden=64, kv_hidden=16, ffn=100, layers=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 1, 5), "no sequences to plan"),
        (([3, 0, 2], 1, 1, 5), "sequence 1 has 0"),
        (([3, 1.5], 1, 1, 5), r"list of whole numbers, got \[3, 1.5\]"),
        (([3], 0, 1, 5), "nodes must be a whole number, at least 1, got 0"),
        (([3], 1, 1, 2.5), "capacity must be a whole number, at least 1, got 2.5"),
        (
            ([9, 9], 1, 3, 5),
            "has 18 tokens, and 3 GPUs with a capacity of 5 take at most 15. A capacity of 6 would just do, 7 leaves",
        ),
    ],
)
def test_what_cannot_be_planned(arguments, message):
    with pytest.raises(PlanError, match=message):
        partition(*arguments)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_batch_is_drawn_again_from_the_same_seed(name):
    lengths = sample_lengths(name, 100_000, seed=1)
    assert sum(lengths) == 100_000
    assert lengths == sample_lengths(name, 100_000, seed=1) != sample_lengths(name, 100_000, seed=2)


def test_lengths_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("5\n3\n8\n")
    (tmp_path / "a.json").write_text("[5, 3, 8]")
    tokenised = datasets.Dataset.from_dict({"input_ids": [[0] * 5, [0] * 3, [0] * 8]})
    tokenised.save_to_disk(tmp_path / "tokenised")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"length": [5, 3, 8]})}).save_to_disk(
        tmp_path / "splits"
    )
    for name in ("a.txt", "a.json", "tokenised", "splits"):
        assert read_lengths(tmp_path / name) == [5, 3, 8]
        assert read_lengths(tmp_path / name, limit=2) == [5, 3]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    for name, content, message in (
        ("b.txt", "5 words", "one length per line"),
        ("b.json", '{"a": 1}', "list of integers"),
        ("empty.txt", "", "contains no lengths"),
        ("text", None, "no column `length` or `input_ids`, only text"),
        ("nowhere", None, "neither a file of lengths, nor"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(PlanError, match=message):
            read_lengths(tmp_path / name)


class TestCommand:
    def run(self, capsys, *arguments):
        from hf_attn.cli import main

        code = main(["plan", *map(str, arguments)])
        return code, *capsys.readouterr()

    def test_it_prints_and_writes(self, capsys, tmp_path):
        import json

        pytest.importorskip("matplotlib")
        plan, picture = tmp_path / "plan.json", tmp_path / "plan.png"
        code, printed, _ = self.run(
            capsys, "long", "--nodes", 2, "--gpus", 4, "--capacity", 16000, "--output", plan, "--plot", picture
        )
        assert code == 0
        assert "with these constants" in printed.lower()
        content = json.loads(plan.read_text())
        for name, seconds in content["predicted_seconds"].items():
            assert f"{name}" in printed and f"{seconds:.4g}" in printed
        assert sum(content["tokens_per_rank"]) == sum(content["plan"]["lengths"]) == int(0.8 * 8 * 16000)
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_it_reads_a_model_and_hardware(self, capsys, tmp_path):
        import json
        from dataclasses import asdict

        from transformers import LlamaConfig

        LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path / "model")
        (tmp_path / "cluster.json").write_text(json.dumps(asdict(HARDWARE["h200"])))
        (tmp_path / "lengths.txt").write_text("100\n50\n")
        arguments = ["--gpus", 2, "--model", tmp_path / "model", "--hardware", tmp_path / "cluster.json"]
        code, printed, _ = self.run(capsys, tmp_path / "lengths.txt", *arguments)
        assert code == 0 and "2 sequences, 150 tokens, on 1 x 2 GPUs with a capacity of 87 tokens" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.txt"], "nowhere.txt is neither a file of lengths"),
            (
                ["mid", "--hardware", "h9000"],
                "--hardware h9000 is not one of a800, h800, h200, and there is no such file",
            ),
            (["mid", "--sequences", "3"], "--sequences is for a file or a dataset"),
            (["mid", "--tokens", "99", "--capacity", "3"], "A capacity of 13 would just do"),
            (["mid", "--output", "no/such/plan.json"], "The folder no/such does not exist"),
        ],
    )
    def test_mistakes_are_told_in_a_line(self, capsys, arguments, message):
        code, _, errors = self.run(capsys, *arguments)
        assert code == 2
        assert message in errors and errors.count("\n") == 1
