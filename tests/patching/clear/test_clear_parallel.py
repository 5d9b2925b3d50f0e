"""CLEAR on several gloo processes against one process."""

from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing, nn

from hf_attn.patching.clear import apply_clear
from hf_attn.patching.clear.parallel import Strip, clear_parallel

from .test_clear import flux_inputs, run, tiny_flux, tiny_sd3


pytestmark = pytest.mark.xdist_group("clear_parallel")

PROCESSES = 4
# name -> rows, radius, more; 13 rows are dealt out as 3, 3, 3, 4 or 6, 7
CASES = {
    "even": {"height": 12, "radius": 4},
    "uneven": {"height": 13, "radius": 3},
    "no halo": {"height": 9, "radius": 1},
    "halo of all rows": {"height": 4, "radius": 2},
    "padded text": {"height": 13, "radius": 3, "mask": True},
    "scaled": {"height": 13, "radius": 3, "proportional_attention": True},
    "other implementation": {"height": 13, "radius": 3, "attn_implementation": "dense"},
    "control": {"height": 13, "radius": 3, "control": True},
    "averaged": {"height": 13, "radius": 3, "text_queries": "averaged"},
}


def set_up(
    height, radius, attn_implementation="auto", mask=False, control=False, text_queries="exact", **attention_kwargs
):
    """A transformer with CLEAR, its inputs, and its computation of text queries."""
    model, inputs = tiny_flux(), flux_inputs(height=height)
    apply_clear(model, radius, attn_implementation=attn_implementation)
    if mask:
        attention_kwargs["attention_mask"] = (torch.arange(5) < 3).expand(2, 5)
    if control:
        generator = torch.Generator().manual_seed(2)
        residuals = torch.randn(2, 2, 7 * height, 32, generator=generator)
        inputs["controlnet_block_samples"] = inputs["controlnet_single_block_samples"] = list(residuals)
    return model, inputs, attention_kwargs, text_queries


def computed(case, group):
    model, inputs, attention_kwargs, text_queries = set_up(**CASES[case])
    with clear_parallel(model, text_queries, group):
        output = run(model, inputs, **attention_kwargs)
    # The model is unchanged.
    assert len(model._forward_pre_hooks) == 1 and not model._forward_hooks
    return output


def first_averaged_text(group):
    """Output of the text queries of the first layer."""
    model, inputs, _, _ = set_up(height=13, radius=3)
    outputs = []
    attend = Strip.attend

    def record(strip, query, *arguments, **kwargs):
        outputs.append(attend(strip, query, *arguments, **kwargs)[:, :, :5])
        return attend(strip, query, *arguments, **kwargs)

    Strip.attend = record
    with clear_parallel(model, "averaged", group):
        run(model, inputs)
    Strip.attend = attend
    return outputs[0]


def errors(group):
    found = {}
    model, inputs, _, _ = set_up(height=8, radius=4)

    def note(name, call):
        try:
            call()
        except ValueError as error:
            found[name] = str(error)

    with clear_parallel(model, group=group):
        note("halo", lambda: run(model, inputs))
        note("rows", lambda: run(model, flux_inputs(height=3)))
        note("gradients", lambda: model(**flux_inputs(height=12)))
        note("nested", lambda: clear_parallel(model, group=group).__enter__())
    return found


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )
    pair = distributed.new_group([1, 2])
    results = {f"{name}, 4 processes": computed(name, None) for name in CASES}
    if rank in (1, 2):
        results |= {f"{name}, 2 processes": computed(name, pair) for name in CASES}
        results["first averaged text"] = first_averaged_text(pair)
    results["errors"] = errors(None)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each process; the processes are started once, because each imports diffusers."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case != "averaged"])
def test_several_processes_compute_the_same_as_one(results, case, processes):
    model, inputs, attention_kwargs, _ = set_up(**CASES[case])
    expected = run(model, inputs, **attention_kwargs)
    outputs = [result[key] for result in results if (key := f"{case}, {processes} processes") in result]
    assert len(outputs) == processes
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("processes", [2, 4])
def test_averaged_text_queries_are_close_and_not_the_same(results, processes):
    model, inputs, _, _ = set_up(**CASES["averaged"])
    expected = run(model, inputs)
    outputs = [result[key] for result in results if (key := f"averaged, {processes} processes") in result]
    for output in outputs:
        assert torch.equal(output, outputs[0])
    deviation = float((outputs[0] - expected).norm() / expected.norm())
    assert 1e-4 < deviation < 0.5


def test_averaging_is_the_mean_over_processes_of_attention_to_text_and_strip(results):
    """The first layer, by the equation: text queries of one process see the text and the rows of that process."""
    captured = {}
    model, inputs, _, _ = set_up(height=13, radius=3)
    attention = model.transformer_blocks[0].attn.processor

    def attend(query, key, value, context, text_length, proportional):
        captured["tokens"] = [states.transpose(1, 2) for states in (query, key, value)]
        raise KeyboardInterrupt

    attention.attend = attend
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs)
    query, key, value = captured["tokens"]
    strips = [slice(5, 5 + 6 * 7), slice(5 + 6 * 7, None)]
    means = []
    for strip in strips:
        keys, values = (torch.cat([states[:, :, :5], states[:, :, strip]], dim=2) for states in (key, value))
        means.append(nn.functional.scaled_dot_product_attention(query[:, :, :5], keys, values))
    expected = torch.stack(means).mean(dim=0)
    for rank in (1, 2):
        torch.testing.assert_close(results[rank]["first averaged text"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_refused_when_called(results):
    for result in results:
        assert result["errors"] == {
            "halo": "8 rows of tokens on 4 processes leave one process with 2, but its neighbour needs 3 of them with "
            "a radius of 4. Use fewer processes, or larger images.",
            "rows": "3 rows of tokens are too few for 4 processes. Use fewer processes.",
            "nested": "The transformer already runs on several processes: clear_parallel contexts cannot be nested.",
            "gradients": "CLEAR on several processes is for inference: call the model under `torch.no_grad()`.",
        }


def test_what_is_refused_at_once(monkeypatch):
    def enter(model, *arguments):
        with clear_parallel(model, *arguments):
            pass

    model = tiny_flux()
    with pytest.raises(TypeError, match="got a SD3Transformer2DModel"):
        enter(tiny_sd3())
    with pytest.raises(ValueError, match="one of exact, averaged, got 'fast'"):
        enter(model, "fast")
    with pytest.raises(RuntimeError, match="no process group: start with `torchrun`"):
        enter(model)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="use `apply_clear` on all layers"):
        enter(model)
    apply_clear(model, 2, down_factor=2)
    with pytest.raises(ValueError, match="Pooled keys are not supported"):
        enter(model)
