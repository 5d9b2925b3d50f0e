"""Every layout on several gloo processes against attention in a single process: outputs and gradients."""

import itertools

import pytest
import torch
from torch import distributed

from hf_attn.distributed.exchange import Peers, count_sent_bytes
from hf_attn.distributed.functional import Schedule, distributed_attention
from hf_attn.distributed.heads import head_spans, project_heads
from hf_attn.distributed.measure import forward_bytes
from hf_attn.distributed.sharding import Sharding, shard_tensor, unshard_tensor

from .processes import in_processes


pytestmark = pytest.mark.xdist_group("distributed_attention")

PROCESSES = 4
LAYOUTS = ("ring", "query", "key", "head", "ulysses", "grid")

# name -> batch, heads, kv_heads, length, more
CASES = {
    "plain": (2, 4, 4, 24, {}),
    "causal": (2, 4, 4, 24, {"causal": True}),
    "uneven": (1, 3, 3, 29, {"causal": True}),
    "zigzag": (2, 4, 2, 31, {"causal": True, "split": "zigzag"}),
    "grouped": (2, 6, 3, 19, {"causal": True}),
    "one kv head": (1, 4, 1, 17, {"causal": True}),
    "padding": (3, 2, 2, 21, {"causal": True, "mask": True}),
    "padding both ways": (3, 2, 2, 21, {"mask": True, "split": "zigzag"}),
    "packed": (1, 2, 2, 37, {"causal": True, "cu_seqlens": [0, 5, 6, 6, 20, 37], "split": "zigzag"}),
    "packed both ways": (1, 2, 1, 37, {"cu_seqlens": [0, 5, 6, 20, 37]}),
    "more ranks than tokens": (1, 2, 2, 3, {"causal": True}),
    "narrow values": (1, 2, 2, 23, {"causal": True, "value_dim": 5}),
    "float32": (2, 4, 2, 40, {"causal": True, "split": "zigzag", "dtype": torch.float32}),
    "bfloat16": (2, 4, 2, 40, {"causal": True, "split": "zigzag", "dtype": torch.bfloat16}),
}


def tensors(batch, heads, kv_heads, length, dtype=torch.float64, value_dim=8, **_):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, value_dim), (heads, value_dim)]
    return [torch.randn(batch, n, length, d, generator=generator, dtype=torch.float64).to(dtype) for n, d in shapes]


def padding(batch, length):
    """Padding on the left, on the right and in the middle."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, -6:] = False
    mask[2, 7:15] = False
    return mask


def options_of(case):
    batch, heads, kv_heads, length, more = CASES[case]
    options = {"causal": False, "split": "contiguous", "cu_seqlens": None, **more}
    options["attention_mask"] = padding(batch, length) if options.pop("mask", False) else None
    return (batch, heads, kv_heads, length), options


def reference(case, dtype=None):
    """Output and gradients in a single process, by the equation."""
    sizes, options = options_of(case)
    query, key, value, cotangent = (x.double().requires_grad_() for x in tensors(*sizes, **options))
    groups, length = sizes[1] // sizes[2], sizes[3]
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool)
    if options["causal"]:
        allowed = allowed.tril()
    if options["cu_seqlens"]:
        document = torch.searchsorted(torch.tensor(options["cu_seqlens"]), torch.arange(length), right=True)
        allowed = allowed & (document[:, None] == document)
    if options["attention_mask"] is not None:
        mask = options["attention_mask"][:, None]
        allowed = allowed & mask[..., None] & mask[:, :, None]
    logits = (query @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~allowed, -torch.inf)
    output = logits.softmax(-1).nan_to_num(0.0) @ v if allowed.any(-1).all() else _masked(logits, allowed) @ v
    (output * cotangent.detach()).sum().backward()
    return [x.detach() for x in (output, query.grad, key.grad, value.grad)]


def _masked(logits, allowed):
    """Softmax whose fully masked rows are zero, also in the gradient."""
    empty = ~allowed.any(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def computed(case, layout, group):
    """Output and gradients from the shards of all ranks."""
    sizes, options = options_of(case)
    peers = Peers(group)
    whole = tensors(*sizes, **options)
    options = {name: options[name] for name in ("causal", "split", "cu_seqlens", "attention_mask")}
    if layout == "head":
        kv_spans = head_spans(sizes[2], peers.size)
        groups = sizes[1] // sizes[2]
        spans = [slice(*kv_spans[peers.rank]) for _ in range(2)]
        many = slice(*(groups * x for x in kv_spans[peers.rank]))
        local = [x[:, s].clone().requires_grad_() for x, s in zip(whole, (many, *spans, many), strict=True)]
    else:
        sharding = Sharding.make(sizes[3], peers.size, options["split"])
        local = [shard_tensor(x, sharding, peers.rank, dim=2).requires_grad_() for x in whole]
    output = distributed_attention(*local[:3], layout=layout, group=group, **options)
    assert output.dtype == local[0].dtype
    (output * local[3].detach()).sum().backward()
    found = [output.detach(), *(x.grad for x in local[:3])]
    if layout == "head":
        shapes = [
            [(*x.shape[:1], (b - a) * n, *x.shape[2:]) for a, b in kv_spans]
            for x, n in zip(found, (groups, groups, 1, 1), strict=True)
        ]
        return [torch.cat(peers.exchange([x] * peers.size, s), 1) for x, s in zip(found, shapes, strict=True)]
    return [unshard_tensor(x, sharding, peers, dim=2) for x in found]


def errors_of(group):
    found = {}
    peers = Peers(group)
    good = torch.zeros(1, 2, 4, 8)

    def note(name, *arguments, **options):
        try:
            distributed_attention(*arguments, group=group, **options)
        except ValueError as error:
            found[name] = str(error)

    odd = peers.rank == 1
    note("dtype", *[good.double() if odd else good] * 3)
    note("unequal dtypes", good, good.bfloat16() if odd else good, good)
    note("heads", *[good[:, :1] if odd else good] * 3)
    note("layout", *[good] * 3, layout="ring" if odd else "query")
    note("causal", *[good] * 3, causal=odd)
    note("mask", *[good] * 3, attention_mask=torch.ones(1, 4 * peers.size) if odd else None)
    note("zigzag", *[good] * 3, split="zigzag")
    note("uneven zigzag", *[good[:, :, : 4 - peers.rank]] * 3, split="zigzag")
    note("grid", *[good] * 3, layout="grid", grid=(3, 2))
    note("name", *[good] * 3, layout="spiral")
    note("tokens", good, good[:, :, :3], good)
    note("multiple", good, torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8))
    note("cu_seqlens", *[good] * 3, cu_seqlens=[0, 3])
    return found


def everything(rank):
    results = {}
    pair, three = distributed.new_group([1, 2]), distributed.new_group([3, 0, 2])
    for name, ranks, group in (("4", range(4), None), ("2", (1, 2), pair), ("3", (0, 2, 3), three)):
        if rank not in ranks:
            continue
        for case, layout in itertools.product(CASES, LAYOUTS):
            results[case, layout, name] = computed(case, layout, group)
    results["errors"] = errors_of(None)
    results["bytes"] = sent_bytes()
    results["projection"] = projected()
    results["many rounds"] = [computed("zigzag", "ring", None)[0] for _ in range(20)][-1]
    return results


def sent_bytes():
    """Bytes that were sent, and those according to the formulas."""
    found = {}
    for layout in ("ring", "query", "key", "ulysses", "grid"):
        for length, kv_heads in ((24, 4), (29, 2)):
            peers, sharding = Peers(), Sharding.make(length, 4)
            states = [torch.zeros(2, heads, sharding.lengths[peers.rank], 8) for heads in (4, kv_heads, kv_heads)]
            with count_sent_bytes() as counter:
                distributed_attention(*states, layout=layout)
            formula = forward_bytes(Schedule(peers, sharding, layout), 2, 4, kv_heads, 8)
            found[layout, length] = (counter.total, formula)
    return found


def projected():
    """W^o in the head layout, with five heads on four ranks."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(40, 40).double()
    peers = Peers()
    whole = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    heads = whole[:, slice(*head_spans(5, 4)[peers.rank])].clone().requires_grad_()
    output, _ = project_heads(heads, projection, peers)
    (output**2).sum().backward()
    weight_grad = peers.all_reduce(projection.weight.grad.clone())
    return output.detach(), heads.grad, weight_grad, projection.bias.grad


@pytest.fixture(scope="module")
def results():
    return in_processes(everything, PROCESSES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_together_compute_what_one_does(results, case, layout):
    dtype = CASES[case][4].get("dtype", torch.float64)
    expected = reference(case)
    found = [(key, result[key]) for result in results for key in result if key[:2] == (case, layout)]
    assert len(found) == 9
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for key, arrays in found:
        for name, array, right in zip(("output", "query", "key", "value"), arrays, expected, strict=True):
            assert array.isfinite().all(), (key, name)
            error = (array.double() - right).abs().max() / right.abs().max().clamp(min=1)
            assert error < tolerance, (key, name, error)


def test_rings_can_be_used_repeatedly(results):
    for result in results:
        torch.testing.assert_close(result["many rounds"], reference("zigzag")[0])


def test_bytes_are_what_the_formulas_say(results):
    batch, heads, tokens, dim, ranks = 2, 4, 6, 8, 4
    shard_bytes = batch * heads * tokens * dim * 4
    logsumexp = batch * heads * tokens * 4
    for result in results:
        found = result["bytes"]
        assert all(sent == formula for sent, formula in found.values())
        assert found["ring", 24][0] == found["query", 24][0] == (ranks - 1) * 2 * shard_bytes
        assert found["key", 24][0] == (ranks - 1) * (2 * shard_bytes + logsumexp)
        assert found["ulysses", 24][0] == (ranks - 1) * (4 * shard_bytes + logsumexp) // ranks
        assert found["grid", 24][0] < found["key", 24][0]


def test_the_projection_of_heads_is_that_of_all_of_them(results):
    torch.manual_seed(0)
    projection = torch.nn.Linear(40, 40).double()
    whole = torch.randn(2, 5, 7, 8, dtype=torch.float64).requires_grad_()
    output = projection(whole.transpose(1, 2).flatten(2))
    (output**2).sum().backward()
    spans = head_spans(5, 4)
    assert spans == [(0, 2), (2, 3), (3, 4), (4, 5)]
    for (start, stop), result in zip(spans, results, strict=True):
        found, heads_grad, weight_grad, bias_grad = result["projection"]
        torch.testing.assert_close(found, output.detach())
        torch.testing.assert_close(heads_grad, whole.grad[:, start:stop])
        torch.testing.assert_close(weight_grad, projection.weight.grad)
        torch.testing.assert_close(bias_grad, projection.bias.grad)


def test_what_is_refused_in_all_ranks(results):
    expected = {
        "dtype": "differ in dtype: torch.float32 in rank 0, torch.float64 in rank 1",
        "heads": "differ in heads: 2 in rank 0, 1 in rank 1",
        "layout": "differ in layout",
        "causal": "differ in causal: 0 in rank 0, 1 in rank 1",
        "mask": "differ in attention mask",
        "uneven zigzag": "Split it with `shard`",
        "grid": "A grid of 3 x 2 needs 6 ranks, but the group has 4",
        "name": "layout must be one of ring, query, key, head, ulysses, grid, got 'spiral'",
        "tokens": "must have the same batch size and number of tokens",
        "multiple": "2 heads are not a multiple of 3 key/value heads",
        "cu_seqlens": "must rise from 0 to the length of the sequence, 16, got [0, 3]",
    }
    for rank, result in enumerate(results):
        errors = result["errors"]
        assert errors.keys() == expected.keys() | {"unequal dtypes"}
        for name, message in expected.items():
            assert message in errors[name], (rank, name)
        own = "must have the same dtype, got torch.float32, torch.bfloat16"
        assert (own if rank == 1 else "The tensors of rank 1 do not match") in errors["unequal dtypes"]


def test_without_a_process_group_it_says_how_to_start():
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="Start the script with `torchrun"):
        distributed_attention(states, states, states)
