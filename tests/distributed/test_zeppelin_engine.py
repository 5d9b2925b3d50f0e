"""Attention in the layout of plans, on gloo processes, against attention of each document alone."""

import random

import pytest
import torch
from torch import distributed, nn

from hf_attn.distributed import sequence_parallel, shard, unshard
from hf_attn.distributed.zeppelin.engine import ZeppelinEngine, zigzag_spans
from hf_attn.distributed.zeppelin.partition import PlanError, partition

from .models import packed_batch, tiny_model
from .processes import in_processes


pytestmark = pytest.mark.xdist_group("zeppelin_engine")

# name -> lengths, nodes, GPUs of a node, capacity
PLANS = {
    "all zones": ([50, 21, 9, 5, 3, 1], 2, 2, 24),
    "local": ([5, 4, 6, 3], 1, 4, 10),
    "one ring": ([37], 1, 4, 10),
    "across": ([61, 2], 2, 2, 17),
    "two rings": ([30, 31], 1, 4, 17),
    "no slack": ([13, 11, 7, 5, 3, 1], 1, 4, 10),
    "shorter than the ring": ([3, 1], 1, 4, 1),
    "four nodes": ([29, 17, 1, 1], 4, 1, 13),
    "two ranks": ([29, 17, 1, 1], 1, 2, 26),
    "two nodes": ([29, 17, 1, 1], 2, 1, 26),
}


def random_plans():
    generator = random.Random(3)
    for _ in range(12):
        lengths = [generator.choice([1, 2, 3, 8, 17, 40]) for _ in range(generator.randint(1, 9))]
        nodes = generator.choice([1, 2])
        yield lengths, nodes, 4 // nodes, -(-sum(lengths) // 4) + generator.choice([0, 2, 9])


def tensors(tokens):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(4, 8), (2, 8), (2, 8), (4, 8)]
    return [torch.randn(tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def expected(lengths, causal=True):
    *states, cotangent = tensors(sum(lengths))
    states = [x.requires_grad_() for x in states]
    outputs = []
    for document in zip(*(x.split(lengths) for x in states), strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in document)
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        outputs.append(output[0].transpose(0, 1))
    output = torch.cat(outputs)
    (output * cotangent).sum().backward()
    return [output.detach(), *(x.grad for x in states)]


def computed(plan, group=None, causal=True):
    engine = ZeppelinEngine(plan, group)
    *states, cotangent = (engine.shard(x) for x in tensors(sum(plan.lengths)))
    states = [x.clone().requires_grad_() for x in states]
    output = engine.attend(*states, causal=causal)
    # Gradients in the balanced layout are returned to their tokens.
    balanced = engine.remap(output)
    assert len(balanced) == engine.schedule.remapping.target[engine.schedule.peers.rank]
    returned = engine.unmap(balanced)
    torch.testing.assert_close(returned, output)
    (returned * cotangent).sum().backward()
    return [engine.unshard(x) for x in (output.detach(), *(x.grad for x in states))]


def train(attention, lengths):
    model = tiny_model(attention=attention).train()
    batch = packed_batch(lengths)
    if attention == "sdpa":
        output = model(**batch, use_cache=False)
        output.loss.backward()
        logits = output.logits.detach()
    else:
        with sequence_parallel(model, nodes=2) as context:
            output = model(**shard(batch))
            output.loss.backward()
            logits = unshard(output.logits.detach())
        sizes = [len(p) for p in (context.schedule.balanced.indices(rank) for rank in range(4))]
        assert max(sizes) - min(sizes) <= 1
    return output.loss.item(), logits, [p.grad for p in model.parameters()]


def everything(rank):
    results = {}
    pair = distributed.new_group([2, 0])
    for name, (lengths, nodes, gpus, capacity) in PLANS.items():
        if nodes * gpus == 4:
            results[name] = computed(partition(lengths, nodes, gpus, capacity))
        elif rank in (0, 2):
            results[name] = computed(partition(lengths, nodes, gpus, capacity), pair)
    results["both ways"] = computed(partition(*PLANS["all zones"]), causal=False)
    results["random"] = [computed(partition(*plan)) for plan in random_plans()]
    results["model"] = train("distributed_zeppelin", MODEL_LENGTHS)
    results["errors"] = []
    wrong = partition([5, 4], 1, 2, 5), partition([5, 4 + rank % 2, 1], 1, 4, 9)
    for plan in wrong:
        try:
            ZeppelinEngine(plan)
        except ValueError as error:
            results["errors"].append(str(error))
    return results


MODEL_LENGTHS = (60, 5, 1, 20, 9)


@pytest.fixture(scope="module")
def results():
    return in_processes(everything, 4)


def check(found, right):
    for array, reference in zip(found, right, strict=True):
        torch.testing.assert_close(array, reference, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", PLANS)
def test_documents_see_themselves_and_nothing_else(results, name):
    found = [result[name] for result in results if name in result]
    assert len(found) == PLANS[name][1] * PLANS[name][2]
    for arrays in found:
        check(arrays, expected(PLANS[name][0]))


def test_attention_in_both_directions(results):
    for result in results:
        check(result["both ways"], expected(PLANS["all zones"][0], causal=False))


def test_random_plans(results):
    for result in results:
        for arrays, (lengths, *_) in zip(result["random"], random_plans(), strict=True):
            check(arrays, expected(lengths))


def test_the_plans_of_these_tests_use_every_zone():
    assert set(partition(*PLANS["all zones"]).zones) == {"local", "intra", "inter"}


def test_a_model_has_the_loss_and_gradients_of_one_process(results):
    loss, logits, gradients = train("sdpa", MODEL_LENGTHS)
    for result in results:
        found_loss, found_logits, found = result["model"]
        assert found_loss == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(found_logits, logits, atol=1e-5, rtol=1e-4)
        for gradient, right in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, right, atol=1e-4 * float(right.abs().max()), rtol=1e-4)


def test_plans_that_do_not_fit_are_refused_in_all_ranks(results):
    for result in results:
        ranks, different = result["errors"]
        assert ranks == "The plan is for 1 x 2 = 2 ranks, but the group has 4."
        assert "do not agree on plan" in different


def test_the_work_of_a_zigzag_is_even():
    pieces = zigzag_spans(100, [8] * 4)
    assert pieces == [
        [(100, 104), (128, 132)],
        [(104, 108), (124, 128)],
        [(108, 112), (120, 124)],
        [(112, 116), (116, 120)],
    ]
    pairs = [sum(i - 99 for start, stop in piece for i in range(start, stop)) for piece in pieces]
    assert pairs == [32 * 33 // 8] * 4
    assert zigzag_spans(0, [1, 1, 1]) == [[(0, 1)], [(1, 2)], [(2, 3)]]


def test_more_tokens_than_the_cluster_takes_names_what_would_do():
    with pytest.raises(
        PlanError, match=r"has 100 tokens, and 4 GPUs with a capacity of 20 take at most 80. A capacity of 25 would"
    ):
        partition([60, 40], 2, 2, 20)
