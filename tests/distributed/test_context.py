"""Models of transformers with sequences split over gloo processes, against a single process."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_attn.distributed import distributed_generate, sequence_parallel, shard, unshard

from .models import batch_of, packed_batch, tiny_model
from .processes import in_processes


pytestmark = pytest.mark.xdist_group("distributed_context")

LAYOUTS = ("ring", "query", "key", "head", "ulysses", "grid")
BATCHES = {
    "plain": batch_of(),
    "padding": batch_of(padding=11),
    "packed": packed_batch(),
}


def prepared(case):
    """Model, batch and context arguments."""
    kind, batch, treatment = CASES[case]
    model = tiny_model(kind).train()
    if treatment == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    if treatment == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, BATCHES[batch]


# name -> kind of model, batch, more
CASES = {
    "llama": ("llama", "plain", None),
    "padding": ("llama", "padding", None),
    "packed": ("llama", "packed", None),
    "qwen2": ("qwen2", "plain", None),
    "gpt2": ("gpt2", "padding", None),
    "lora": ("llama", "packed", "lora"),
    "checkpointing": ("llama", "plain", "checkpointing"),
    "accumulation": ("llama", "plain", "accumulation"),
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def in_one_process(case):
    model, batch = prepared(case)
    output = model(**batch, use_cache=False)
    output.loss.backward()
    if CASES[case][2] == "accumulation":
        model(**batch, use_cache=False).loss.backward()
    return output.loss.item(), gradients(model), output.logits.detach()


def split(case, layout):
    model, batch = prepared(case)
    model.set_attn_implementation(f"distributed_{layout}")
    with sequence_parallel(model, split="contiguous" if layout == "grid" else "zigzag"):
        output = model(**shard(batch))
        output.loss.backward()
        if CASES[case][2] == "accumulation":
            model(**shard(batch)).loss.backward()
        logits = unshard(output.logits.detach())
    return output.loss.item(), gradients(model), logits


PROMPTS = {
    "greedy": {"max_new_tokens": 7, "do_sample": False},
    "sampled": {"max_new_tokens": 7, "do_sample": True, "temperature": 0.7},
    "beams": {"max_new_tokens": 5, "num_beams": 3, "do_sample": False},
    "penalty": {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": 1.7},
}


def prompt(rows=2):
    batch = batch_of(rows, 19)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :6] = 0
    return {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}


def generated(options, layout, seed):
    model = tiny_model(attention=f"distributed_{layout}").eval()
    torch.manual_seed(seed)
    return distributed_generate(model, **prompt(), **options, pad_token_id=0)


def refusals():
    found = {}
    batch = batch_of()

    def note(name, call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)

    def enter(model, batch=batch):
        with sequence_parallel(model):
            model(**shard(batch))

    note("implementation", lambda: enter(tiny_model()))
    note("window", lambda: enter(tiny_model("mistral", "distributed_ring", sliding_window=8)))
    gemma = Gemma2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, vocab_size=61
    )
    note("soft cap", lambda: enter(Gemma2ForCausalLM._from_config(gemma, attn_implementation="distributed_ring")))
    model = tiny_model(attention="distributed_ring")
    note("outside", lambda: model(**batch))

    def unsharded():
        with sequence_parallel(model):
            model(**batch)

    def outer_backward():
        with sequence_parallel(model):
            loss = model(**shard(batch)).loss
        loss.backward()

    def dropout():
        dropping = tiny_model(attention="distributed_ring", attention_dropout=0.5).train()
        enter(dropping)

    note("unsharded", unsharded)
    note("backward", outer_backward)
    note("dropout", dropout)
    note("other batch", lambda: enter(model, batch_of(2, 37 + torch.distributed.get_rank() % 2)))
    note(
        "other tokens", lambda: enter(model, {**batch, "input_ids": batch["input_ids"] + torch.distributed.get_rank()})
    )
    note("few tokens", lambda: enter(model, {"input_ids": torch.tensor([[5, 6]])}))
    note("empty", lambda: enter(model, {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}))
    note("mask", lambda: enter(model, {**batch, "attention_mask": torch.ones(1, 37)}))
    note("odd tensor", lambda: enter(model, {**batch, "token_type_ids": torch.zeros(2, 5)}))
    note(
        "right padding",
        lambda: distributed_generate(model, **{**prompt(), "attention_mask": prompt()["attention_mask"].flip(1)}),
    )
    note("assistant", lambda: distributed_generate(model, **prompt(), assistant_model=model))
    return found


def everything(rank):
    results = {("refusals",): refusals()}
    results |= {(case, layout): split(case, layout) for case in CASES for layout in LAYOUTS}
    model = tiny_model(attention="distributed_ring").bfloat16()
    with sequence_parallel(model):
        loss = model(**shard(BATCHES["packed"])).loss
        loss.backward()
    results["bfloat16",] = loss.item(), gradients(model)
    for name, options in PROMPTS.items():
        for layout in LAYOUTS if name == "greedy" else ("ring",):
            results[name, layout, "generated"] = generated(options, layout, 5 + rank)
    return results


@pytest.fixture(scope="module")
def results():
    return in_processes(everything, 3)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_process(results, case):
    loss, expected, logits = in_one_process(case)
    for result in results:
        for layout in LAYOUTS:
            found_loss, found, found_logits = result[case, layout]
            assert found_loss == pytest.approx(loss, abs=1e-5), layout
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)
            mask = BATCHES[CASES[case][1]].get("attention_mask", torch.ones(logits.shape[:2])).bool()
            torch.testing.assert_close(found_logits[mask], logits[mask], atol=1e-5, rtol=1e-4)


def test_bfloat16_is_as_close_as_in_one_process(results):
    exact, expected, _ = in_one_process("packed")
    model = tiny_model().bfloat16()
    model(**BATCHES["packed"], use_cache=False).loss.backward()
    own = gradients(model)
    for result in results:
        loss, found = result["bfloat16",]
        assert loss == pytest.approx(exact, rel=1e-2)
        for name, gradient in expected.items():
            error, budget = ((x[name].float() - gradient).norm() for x in (found, own))
            assert error <= 2 * budget + 2**-8 * gradient.norm(), name


@pytest.mark.parametrize("name", PROMPTS)
def test_generation_is_that_of_one_process(results, name):
    model = tiny_model().eval()
    if name == "sampled":
        # The seed that rank 0 draws.
        torch.manual_seed(5)
        torch.manual_seed(int(torch.randint(2**31, (1,))))
    expected = model.generate(**prompt(), **PROMPTS[name], pad_token_id=0)
    for result in results:
        for layout in LAYOUTS if name == "greedy" else ("ring",):
            assert torch.equal(result[name, layout, "generated"], expected), layout


def test_what_is_refused(results):
    expected = {
        "implementation": "has attn_implementation='sdpa'. Choose how ranks share a sequence",
        "window": "a sliding window of 8",
        "soft cap": "soft-capped logits",
        "outside": "works only inside `with sequence_parallel(model):`",
        "unsharded": "Call it as `model(**shard(batch))`",
        "backward": "Call `loss.backward()` inside",
        "dropout": "does not support dropout of 0.5",
        "other batch": "do not agree on length (rank 0: 37, rank 1: 38",
        "other tokens": "do not agree on tokens",
        "few tokens": "2 tokens are too few for 3 ranks",
        "empty": "The batch is empty: 1 rows of 0 tokens",
        "mask": "The attention mask must have the shape (2, 37)",
        "odd tensor": "token_type_ids has shape (2, 5)",
        "right padding": "padded on the left",
        "assistant": "does not support assistant_model",
    }
    for result in results:
        found = result["refusals",]
        assert found.keys() == expected.keys()
        for name, message in expected.items():
            assert message in found[name], name
