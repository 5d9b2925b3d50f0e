"""How the memory stores and reads blocks: fast implementations against plain ones, and memory use."""

import gc
from itertools import pairwise

import pytest
import torch
from transformers import set_seed

from hf_attn.attention.landmark import grouped_softmax
from hf_attn.modeling.landmark import retrieval as retrieval_landmark
from hf_attn.modeling.landmark import store as store_landmark
from hf_attn.modeling.landmark.cache import Destination
from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from hf_attn.modeling.landmark.modeling_landmark import LandmarkCache, LandmarkForCausalLM
from hf_attn.modeling.landmark.store import BlockStore

from .test_modeling_landmark import BLOCK, CLOSE, VOCAB, logits_of, make_model, random_ids


def filled_layer(blocks: int, rows: int = 2, paged: bool = False):
    """A layer of 2 key/value heads of width 8 with random states in all its blocks."""
    config = LandmarkConfig(
        vocab_size=9, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, mem_freq=BLOCK - 1
    )
    layer = LandmarkCache(config, top_k=2, offload_to_cpu=paged).layers[0]
    keys, values = torch.randn(2, rows, 2, blocks * BLOCK, 8)
    layer.lazy_initialization(keys, values)
    row, slot = (
        index.flatten() for index in torch.meshgrid(torch.arange(rows), torch.arange(blocks * BLOCK), indexing="ij")
    )
    for store, states in ((layer.keys, keys), (layer.values, values)):
        store.reserve(blocks * BLOCK)
        store.write(row, slot, states[row, :, slot])
    layer.landmark_keys = keys[:, :, BLOCK - 1 :: BLOCK]
    return layer, keys, values


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("blocks", [3, 40], ids="blocks_{}".format)
@pytest.mark.parametrize("elements", [2**22, 100], ids="elements_{}".format)
def test_reading_in_tiles_equals_reading_query_by_query(paged, blocks, elements, monkeypatch):
    """A block has exactly as many readers as fit into a tile, fewer, or more; 100 elements are two blocks at once."""
    set_seed(0)
    monkeypatch.setattr(retrieval_landmark, "GATHERED_ELEMENTS", elements)
    layer, _, _ = filled_layer(blocks, paged=paged)
    query, slots = torch.randn(2, 4, 30, 2, 8), torch.randint(blocks, (2, 4, 30, 2))
    computed = retrieval_landmark._read_in_tiles(layer, slots, query, 0.3, True)
    one_by_one = [
        retrieval_landmark._read_same(layer, slots[:, :, [i]], query[:, :, [i]], 0.3) for i in range(query.shape[2])
    ]
    for name, ours, parts in zip(("gates", "inside", "read"), computed, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(parts, dim=2), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("recent", "length"), [(0, 5), (0, 12), (3, 12), (4, 11), (2, 1)])
def test_weights_block_by_block_are_the_grouped_softmax(recent, length):
    set_seed(0)
    gates, scores = torch.randn(2, 4, length, 2), torch.randn(2, 4, length, recent + length)
    computed = retrieval_landmark._block_by_block(gates, scores, BLOCK)
    # A retrieved block is one regular token that a landmark closes.
    keys = torch.arange(recent + length)
    flags = torch.cat([torch.tensor([False, True, False, True]), keys % BLOCK == BLOCK - 1])
    allowed = torch.cat([torch.ones(length, 4, dtype=torch.bool), keys <= keys[recent:, None]], dim=-1)
    whole = torch.cat([torch.stack([torch.zeros_like(gates), gates], dim=-1).flatten(-2), scores], dim=-1)
    weights = grouped_softmax(whole, flags.expand(2, -1), allowed)
    torch.testing.assert_close(computed[0], weights[..., 0:4:2])
    torch.testing.assert_close(computed[1], weights[..., 4:])


@pytest.mark.parametrize("paged", [False, True])
def test_reading_a_block_is_a_softmax_of_its_regular_tokens(paged):
    set_seed(0)
    layer, keys, values = filled_layer(5, paged=paged)
    query, slots = torch.randn(2, 4, 3, 2, 8), torch.randint(5, (2, 4, 3, 2))
    gates, inside, read = retrieval_landmark._read_in_tiles(layer, slots, query, 0.3, True)
    for row, head, i, k in [(0, 0, 0, 0), (1, 1, 2, 0), (0, 2, 1, 1), (1, 3, 2, 1)]:
        block = slice(slots[row, head, i, k] * BLOCK, (slots[row, head, i, k] + 1) * BLOCK)
        scores = 0.3 * keys[row, head // 2, block] @ query[row, head, i, k]
        weights = scores[:-1].softmax(-1)
        torch.testing.assert_close(gates[row, head, i, k], scores[-1])
        torch.testing.assert_close(inside[row, head, i, k], weights)
        torch.testing.assert_close(read[row, head, i, k], weights @ values[row, head // 2, block][:-1])


@pytest.mark.parametrize("retrieval", ["per_token_and_head", "max_over_tokens"])
@pytest.mark.parametrize("max_blocks", [None, 5])
def test_pages_hold_what_one_buffer_holds(retrieval, max_blocks, monkeypatch):
    """Rows of different lengths, whose tokens go to different pages, and further tokens after the cache was cut."""
    monkeypatch.setattr(store_landmark, "PAGE_BLOCKS", 2)
    model, ids, more = make_model(), random_ids(2, 60), random_ids(2, 6, seed=2)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    results = []
    for offload in (False, True):
        memory = LandmarkCache(
            model.config, 2, retrieval, max_chunk_length=15, offload_to_cpu=offload, max_blocks=max_blocks
        )
        arguments = {"past_key_values": memory, "insert_landmarks": True}
        logits = [logits_of(model, ids, attention_mask=mask, **arguments)[mask.bool()]]
        if max_blocks is None:
            memory.crop(-7)
        memory.reorder_cache(torch.tensor([1, 0]))
        logits += [logits_of(model, step, **arguments) for step in more.split(1, dim=1)]
        results.append(logits)
    assert len(memory.layers[0].keys.pages) == (8 if max_blocks is None else 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_page_is_never_copied():
    store = BlockStore(torch.zeros(1, 2, 7, 8), BLOCK, torch.device("cpu"), paged=True)
    addresses = []
    for slots in (1, 3 * BLOCK, 16 * BLOCK, 16 * BLOCK + 1, 90 * BLOCK):
        store.reserve(slots)
        addresses.append([page.data_ptr() for page in store.pages])
    assert [len(pages) for pages in addresses] == [1, 1, 1, 2, 6]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(addresses))
    assert store.shape == (1, 2, 96 * BLOCK, 8) and store.nbytes == 2 * 96 * BLOCK * 8 * 4


def peak_bytes(function) -> int:
    """Peak memory in bytes while a function runs, beyond that at its start."""
    gc.collect()  # a cache and its layers reference each other, and must not be freed meanwhile
    held = peak = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def offloaded_memory(config: LandmarkConfig, blocks: int) -> tuple[LandmarkCache, int]:
    """An offloaded memory of a model with one layer, filled block by block, and the bytes held at most meanwhile beyond the
    stored keys and values."""
    memory, block = LandmarkCache(config, top_k=2, offload_to_cpu=True), config.block_size
    memory.start(config, 1, torch.device("cpu"), inserts_landmarks=True)
    layer, (keys, values) = memory.layers[0], torch.randn(2, 1, config.num_key_value_heads, block, config.head_dim)

    def fill() -> None:
        for number in range(blocks):
            slots = number * block + torch.arange(block)[None]
            layer.update(keys, values, Destination.of(slots, (number + 1) * block, block))

    peak = peak_bytes(fill)
    is_landmark = torch.arange(blocks * block) % block == block - 1
    memory.append_tokens(torch.ones_like(is_landmark)[None], is_landmark[None])
    memory.seen_tokens = blocks * config.mem_freq
    return memory, peak - layer.keys.nbytes - layer.values.nbytes


def test_the_working_set_of_an_offloaded_memory_is_bounded(monkeypatch):
    """Filling holds the old and the new landmark keys of a layer beyond the blocks, and reading grows by the scores of the
    landmarks (three arrays at once), for a text of more than twice the length."""
    monkeypatch.setattr(retrieval_landmark, "GATHERED_ELEMENTS", 2**12)
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LandmarkForCausalLM(LandmarkConfig(vocab_size=VOCAB + 1, mem_freq=63, **sizes)).eval()
    filling, reading, landmarks = [], [], []
    for blocks in (48, 112):
        memory, working = offloaded_memory(model.config, blocks)
        arguments = {"past_key_values": memory, "insert_landmarks": True, "logits_to_keep": 1}
        filling.append(working)
        landmarks.append(memory.layers[0].landmark_keys.nbytes)
        # A page and the landmark keys have room for one more token.
        ids = random_ids(1, 40)
        reading.append(peak_bytes(lambda ids=ids, arguments=arguments: logits_of(model, ids, **arguments)))
    assert filling[1] - filling[0] <= 2 * (landmarks[1] - landmarks[0])
    scores = model.config.num_attention_heads * 40 * (112 - 48) * 4
    assert reading[1] - reading[0] <= 3 * scores + landmarks[1]
