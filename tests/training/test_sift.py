"""SiFT as a Trainer mixin."""

import pytest
import torch
import transformers
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    TrainingArguments,
    default_data_collator,
)

from hf_attn import SiFTTrainerMixin, apply_fast_attention
from hf_attn.training.sift import sift_loss
from tests.distributed.processes import in_processes


FIELDS = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 8,
    "position_biased_input": False,
}


class SiFTTrainer(SiFTTrainerMixin, transformers.Trainer):
    pass


def train(tmp_path, model_class, labels, num_labels, trainer_class=SiFTTrainer, **sift):
    torch.manual_seed(0)
    model = model_class(DebertaV2Config(**FIELDS, num_labels=num_labels))
    apply_fast_attention(model)
    rows = [{"input_ids": torch.randint(1, 40, (8,)).tolist(), "labels": label} for label in labels]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator, **sift
    )
    loss = trainer.train().training_loss
    return loss, trainer.evaluate()["eval_loss"], {name: p.detach().clone() for name, p in model.named_parameters()}


CLASSES = [number % 3 for number in range(8)]
TASKS = {
    "classification": (DebertaV2ForSequenceClassification, CLASSES, 3),
    "regression": (DebertaV2ForSequenceClassification, [float(number) for number in CLASSES], 1),
    "tokens": (DebertaV2ForTokenClassification, [[-100, *([number] * 6), -100] for number in CLASSES], 3),
}


@pytest.mark.parametrize("task", TASKS)
def test_trains_every_task_and_evaluates_plainly(tmp_path, task):
    plain_loss, plain_evaluation, plain = train(tmp_path, *TASKS[task], transformers.Trainer)
    off_loss, off_evaluation, off = train(tmp_path, *TASKS[task], sift_lambda=0.0)
    assert (off_loss, off_evaluation) == (plain_loss, plain_evaluation)
    assert all(torch.equal(off[name], plain[name]) for name in plain)
    loss, _, parameters = train(tmp_path, *TASKS[task], sift_lambda=2.0, sift_sigma=0.1)
    assert loss > plain_loss
    assert any(not torch.equal(parameters[name], plain[name]) for name in plain)


def test_step_of_ascent_is_bounded_and_frozen_parameters_stay_frozen():
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**FIELDS, num_labels=3))
    model.deberta.encoder.requires_grad_(False)
    ids, labels = torch.randint(1, 40, (4, 8)), torch.tensor([0, 1, 2, 0])

    def compute_clean():
        output = model(ids, labels=labels)
        return output.loss, output

    step = sift_loss(model, compute_clean, lambda: model(ids).logits, sift_lambda=0.0, learning_rate=1e-3, sigma=0.05)
    assert torch.equal(step.loss, step.task_loss)
    assert step.first_delta.abs().max() <= 0.1
    assert 0 < (step.delta - step.first_delta).abs().max() <= 1e-3 * (1 + 1e-5)
    step.adversarial_loss.backward()
    assert not any(p.requires_grad for p in model.deberta.encoder.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert not model.deberta.embeddings.LayerNorm._forward_pre_hooks


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="sift_inner_loss must be one of"):
        train(tmp_path, *TASKS["classification"], sift_inner_loss="js")
    with pytest.raises(ValueError, match="must not be negative"):
        train(tmp_path, *TASKS["classification"], sift_lambda=-1.0)
    gpt = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm"):
        SiFTTrainer(gpt, TrainingArguments(str(tmp_path), report_to="none"))


def gradients_in_a_process(rank: int, folder: str) -> tuple[dict, dict]:
    """Gradients of a step on the samples of this process, with DistributedDataParallel and without."""
    torch.manual_seed(0)
    fields = FIELDS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**fields, num_labels=3)).train()
    trainer = SiFTTrainer(model, TrainingArguments(folder, report_to="none", use_cpu=True), sift_lambda=5.0)
    torch.manual_seed(rank)
    inputs = {"input_ids": torch.randint(1, 40, (2 + rank, 8)), "labels": torch.arange(2 + rank)}
    found = []
    # As Trainer wraps it.
    for wrapped in (torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), model):
        model.zero_grad()
        torch.manual_seed(10 + rank)
        trainer.compute_loss(wrapped, dict(inputs)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return tuple(found)


def test_two_processes_have_the_mean_of_their_gradients(tmp_path):
    (together, first), (others, second) = in_processes(gradients_in_a_process, 2, str(tmp_path))
    torch.testing.assert_close(together, others)
    expected = {name: (first[name] + second[name]) / 2 for name in first}
    torch.testing.assert_close(together, expected)
