"""The mean loss of an evaluation in two processes equals that of one, also if the last batches are padded."""

import pytest
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_attn.training.evaluation import ExactEvaluationMixin
from tests.distributed.models import batch_of, tiny_model
from tests.distributed.processes import free_port, in_processes, set_launcher_variables


class ExactTrainer(ExactEvaluationMixin, Trainer):
    pass


def losses(output: str) -> list[float]:
    """Losses of 5, 6, 7 and 8 sequences, with batch size 2."""
    arguments = TrainingArguments(
        output, per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = ExactTrainer(model=tiny_model(), args=arguments, data_collator=default_data_collator)
    rows = [{"input_ids": row, "labels": row} for row in batch_of(8, 12)["input_ids"]]
    return [trainer.evaluate(rows[:count])["eval_loss"] for count in (5, 6, 7, 8)]


def in_one_of_two(rank: int, port: int, output: str) -> list[float]:
    set_launcher_variables(rank, 2, port)
    return losses(output)


def test_no_sample_counts_twice(tmp_path):
    one = losses(str(tmp_path / "one"))
    for found in in_processes(in_one_of_two, 2, free_port(), str(tmp_path / "two"), timeout=300):
        assert found == pytest.approx(one, rel=1e-5)
