"""Trainer with sequences split over processes ends with the weights of a single process."""

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_attn.distributed.trainer import SequenceParallelTrainerMixin
from hf_attn.distributed.zeppelin.parallel import Cluster
from hf_attn.distributed.zeppelin.partition import PlanError
from hf_attn.distributed.zeppelin.trainer import ZeppelinCollator, ZeppelinTrainerMixin

from .models import tiny_model
from .processes import free_port, in_processes, set_launcher_variables


pytestmark = pytest.mark.xdist_group("distributed_trainer")

PROCESSES = 2


class SharedTrainer(SequenceParallelTrainerMixin, Trainer):
    pass


class UnevenTrainer(ZeppelinTrainerMixin, Trainer):
    num_nodes = 2


def padded(features):
    length = max(len(feature["input_ids"]) for feature in features)
    rows = [feature["input_ids"] + [0] * (length - len(feature["input_ids"])) for feature in features]
    ids = torch.tensor(rows)
    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# name -> Trainer on several processes, its implementation, collator, and that of one process
KINDS = {
    "ring": (SharedTrainer, "distributed_ring", padded, padded),
    "head": (SharedTrainer, "distributed_head", padded, padded),
    "zeppelin": (UnevenTrainer, "distributed_zeppelin", ZeppelinCollator(), DataCollatorWithFlattening()),
}


def documents():
    generator = torch.Generator().manual_seed(2)
    lengths = [40, 3, 9, 17, 2, 30, 5, 8, 12, 21, 4, 6, 33, 7, 11, 10]
    return [{"input_ids": torch.randint(3, 61, (n,), generator=generator).tolist()} for n in lengths]


def train(kind, folder, shared, resume=None, **more):
    trainer_class, implementation, collator, plain = KINDS[kind]
    model = tiny_model(attention=implementation if shared else "sdpa")
    # With a cache, transformers would not detect that a batch is packed.
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=2,
        seed=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        **more,
    )
    trainer = (trainer_class if shared else Trainer)(
        model=model,
        args=arguments,
        train_dataset=documents(),
        eval_dataset=documents()[:5],
        data_collator=collator if shared else plain,
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()["eval_loss"]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses, evaluation


def everything(rank, folder, port):
    set_launcher_variables(rank, PROCESSES, port)
    results = {kind: train(kind, Path(folder, kind), shared=True) for kind in KINDS}
    checkpoint = str(Path(folder, "zeppelin", "checkpoint-2"))
    results["resumed"] = train("zeppelin", Path(folder, "resumed"), shared=True, resume=checkpoint)
    results["checkpointing"] = train(
        "ring",
        Path(folder, "checkpointing"),
        shared=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    results["bf16"] = train("ring", Path(folder, "bf16"), shared=True, bf16=True)
    results["refused"] = []
    for kind, more in (("ring", {"label_smoothing_factor": 0.1}), ("ring", {})):
        try:
            if more:
                train(kind, Path(folder, "refused"), shared=True, **more)
            else:
                UnevenTrainer(
                    model=tiny_model(attention="distributed_ring"), args=TrainingArguments(str(folder), use_cpu=True)
                )
        except ValueError as error:
            results["refused"].append(str(error))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(everything, PROCESSES, str(tmp_path_factory.mktemp("shared")), free_port())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return {kind: train(kind, tmp_path_factory.mktemp(kind), shared=False) for kind in ("ring", "zeppelin")}


@pytest.mark.parametrize("kind", [*KINDS, "resumed", "checkpointing"])
def test_the_weights_are_those_of_one_process(results, one_process, kind):
    expected, losses, evaluation = one_process["zeppelin" if kind in ("zeppelin", "resumed") else "ring"]
    start = dict(tiny_model().named_parameters())
    for result in results:
        weights, found_losses, found_evaluation = result[kind]
        assert found_losses == pytest.approx(losses[-len(found_losses) :], abs=1e-5)
        assert found_evaluation == pytest.approx(evaluation, abs=1e-5)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)
            assert not torch.equal(start[name], weight) or "norm" in name, name


def test_bfloat16_is_as_exact_as_in_one_process(results, one_process, tmp_path):
    exact, losses, _ = one_process["ring"]
    rounded, _, _ = train("ring", tmp_path, shared=False, bf16=True)

    def error(weights):
        return sum((weights[name] - weight).square().sum() for name, weight in exact.items()).sqrt()

    for result in results:
        weights, found_losses, _ = result["bf16"]
        # Both round, in different orders; float32 would be exact.
        assert 0.1 * error(rounded) < error(weights) < 2 * error(rounded)
        assert found_losses == pytest.approx(losses, rel=2**-7)


def test_what_is_refused(results):
    for result in results:
        smoothing, implementation = result["refused"]
        assert "do not use label_smoothing_factor" in smoothing
        assert "attn_implementation='distributed_zeppelin'" in implementation


def test_without_other_processes_it_is_a_trainer(tmp_path, one_process, monkeypatch):
    monkeypatch.setattr(UnevenTrainer, "num_nodes", 1)
    weights, _, _ = train("zeppelin", tmp_path, shared=True)
    for name, weight in one_process["zeppelin"][0].items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


def test_the_collator_refuses_what_the_cluster_does_not_take():
    collator = ZeppelinCollator(Cluster(1, 2, 10))
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    with pytest.raises(PlanError, match="has 21 tokens, and 2 GPUs with a capacity of 10 take at most 20"):
        collator([{"input_ids": [5] * 21}])
    with pytest.raises(PlanError, match="document 1 of the batch has none"):
        collator([{"input_ids": [5]}, {"input_ids": []}])
