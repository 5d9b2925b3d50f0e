"""The losses and the Trainer of EchoAtt's distillation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from hf_attn.modeling.echo_att.distillation import (
    EchoAttDistillationTrainer,
    block_ends,
    hard_label_loss,
    intermediate_loss,
    recorded_layers,
    soft_label_loss,
)
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from hf_attn.training.stages import last_complete_checkpoint, train_stage


ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "goldens" / "echo_att" / "lm_shared_2_3_5"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def make_teacher(**overrides):
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).eval()


def make_dataset(count: int = 16, length: int = 8):
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 40, (count, length), generator=generator)
    return [{"input_ids": block, "labels": block} for block in blocks]


def make_arguments(folder, **overrides):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **overrides})


def make_trainer(folder, dataset=None, callbacks=None, teacher=None, **overrides):
    teacher = make_teacher() if teacher is None else teacher
    return EchoAttDistillationTrainer(
        model=EchoAttForCausalLM.from_base(make_teacher(), shared_layers=[2, 4]),
        teacher=teacher,
        args=make_arguments(folder, **overrides),
        train_dataset=make_dataset() if dataset is None else dataset,
        callbacks=callbacks,
    )


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "io.safetensors")


def test_losses_of_the_golden_case(golden):
    case, io = golden
    tolerance = case["tolerance"]
    config = EchoAttConfig(num_hidden_layers=6, shared_layers=case["config"]["shared_layers"])
    ends = block_ends(config)
    assert [layer + 1 for layer in ends] == io["block_ends"].tolist()
    student, teacher = (
        [io[name][layer + 1][None] for layer in ends] for name in ("hidden_states", "teacher_hidden_states")
    )
    logits, teacher_logits = io["logits"][None], io["teacher_logits"][None]
    losses = {
        "loss_LI_mse": intermediate_loss(student, teacher),
        "loss_LI_sumsq": intermediate_loss(student, teacher, reduction="sum"),
        "loss_LS_student_teacher": soft_label_loss(logits, teacher_logits),
        "loss_LS_teacher_student": soft_label_loss(logits, teacher_logits, direction="teacher_student"),
        "loss_LH": hard_label_loss(logits, teacher_logits),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss, io[name].squeeze(), **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_trainer_computes_the_total_of_the_golden_case(golden, tmp_path):
    case, io = golden
    weights = load_file(GOLDEN / "weights.safetensors")
    student = from_official("echo_att", weights, config=case["config"])
    full = {name.removeprefix("teacher_only."): tensor for name, tensor in weights.items()}
    teacher = from_official("echo_att", full, config={**case["config"], "shared_layers": []})
    trainer = EchoAttDistillationTrainer(model=student, teacher=teacher, args=make_arguments(tmp_path))
    loss = trainer.compute_loss(student, {"input_ids": io["input_ids"][None]})
    torch.testing.assert_close(loss, io["loss_total"].squeeze(), **case["tolerance"])


def test_losses_of_a_student_that_equals_its_teacher():
    logits, states = torch.randn(2, 5, 7), [torch.randn(2, 5, 3)]
    for reduction in ("mean", "sum"):
        assert intermediate_loss(states, states, reduction=reduction) == 0
    for direction in ("student_teacher", "teacher_student"):
        assert soft_label_loss(logits, logits, direction=direction) == 0
    torch.testing.assert_close(hard_label_loss(logits, logits), -logits.log_softmax(-1).amax(-1).mean())


def test_padding_does_not_count():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 2, 5, 7)
    states, teacher_states = torch.randn(2, 2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    for function, student, teacher in (
        (lambda s, t, m=None: intermediate_loss([s], [t], m), states, teacher_states),
        (soft_label_loss, logits, teacher_logits),
        (hard_label_loss, logits, teacher_logits),
    ):
        torch.testing.assert_close(function(student, teacher, mask), function(student[:, :3], teacher[:, :3]))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        intermediate_loss([torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)], reduction="max")
    with pytest.raises(ValueError, match="got 'both'"):
        soft_label_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), direction="both")


def test_recorded_states_are_before_the_final_norm():
    teacher = make_teacher()
    ids = torch.arange(6)[None]
    with torch.no_grad(), recorded_layers(teacher, [1, 4]) as states:
        outputs = teacher(ids, output_hidden_states=True)
    torch.testing.assert_close(states[0], outputs.hidden_states[2])
    torch.testing.assert_close(teacher.model.norm(states[1]), outputs.hidden_states[5])
    teacher(ids)
    assert len(states) == 2


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_distillation_brings_the_student_closer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30, learning_rate=5e-3, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


def first_step(trainer):
    """Loss and gradients of the first optimisation step."""
    seen = {}

    class Capture(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    trainer.add_callback(Capture())
    trainer.train()
    return trainer.state.log_history[0]["loss"], seen


def padded_dataset():
    """Sequences of different lengths, so that a mean of means is not the mean."""
    dataset = []
    for index, row in enumerate(make_dataset()):
        mask = torch.ones(8, dtype=torch.long)
        mask[8 - index % 4 :] = 0
        dataset.append({"input_ids": row["input_ids"], "attention_mask": mask})
    return dataset


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_accumulation_equals_one_big_batch(tmp_path, reduction):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(batch),
            padded_dataset(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
        )
        trainer.intermediate_reduction = reduction
        results.append(first_step(trainer))
    (loss, gradients), (accumulated_loss, accumulated) = results
    assert accumulated_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


class Interrupt(TrainerCallback):
    """Interrupts the process in the middle of a stage, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path):
    whole = train_stage(make_trainer(tmp_path / "a"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_stage(make_trainer(tmp_path / "b", callbacks=[Interrupt(5)]), tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    # A checkpoint that was incomplete when the process ended.
    torn = tmp_path / "b" / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(tmp_path / "b").name == "checkpoint-4"

    trainer = make_trainer(tmp_path / "b")
    resumed = train_stage(trainer, tmp_path / "resumed")
    assert trainer.state.global_step == 6
    expected, weights = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name

    untouched = make_trainer(tmp_path / "b")
    train_stage(untouched, tmp_path / "resumed")
    assert untouched.state.global_step == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": 50}, "vocab_size is 50 and 40"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4 and 5"),
        ({"hidden_size": 32}, "hidden_size is 32 and 16"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, teacher=make_teacher(**overrides))


def test_a_student_that_shares_nothing_is_refused(tmp_path):
    student = EchoAttForCausalLM.from_base(make_teacher(), shared_layers=[])
    with pytest.raises(ValueError, match="shares no layer"):
        EchoAttDistillationTrainer(model=student, teacher=make_teacher(), args=make_arguments(tmp_path))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    results = []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": checkpointing, "max_steps": 1, "save_strategy": "no"}
        results.append(first_step(make_trainer(tmp_path / str(checkpointing), **options)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_stage_two_is_a_plain_trainer(tmp_path):
    student = EchoAttForCausalLM.from_base(make_teacher(), shared_layers=[2, 4])
    trainer = Trainer(student, make_arguments(tmp_path / "stage2"), train_dataset=make_dataset())
    folder = train_stage(trainer, tmp_path / "refined")
    assert EchoAttForCausalLM.from_pretrained(folder).config.shared_layers == [2, 4]


# --- several processes -----------------------------------------------------------------------------------------------


TWO_PROCESSES = """
import gc, sys, torch
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from tests.modeling.echo_att.test_distillation_echo_att import *

trainer = make_trainer(sys.argv[2], padded_dataset(), per_device_train_batch_size=int(sys.argv[3]), max_steps=1,
                       max_grad_norm=0.0, save_strategy="no", ddp_backend="gloo" if int(sys.argv[3]) == 4 else None)
loss, gradients = first_step(trainer)
if trainer.is_world_process_zero():
    torch.save((loss, {name.removeprefix("module."): grad for name, grad in gradients.items()}), sys.argv[4])
# A process that exits with its group open, or in use by a model, can abort.
trainer.accelerator.wait_for_everyone()
del trainer
gc.collect()
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_start_like_one(tmp_path):
    script = tmp_path / "first_step.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for processes, batch in ((1, 8), (2, 4)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes == 1:
            launcher = [sys.executable]
        out = tmp_path / f"{processes}.pt"
        subprocess.run(
            [*launcher, str(script), str(ROOT), str(tmp_path / f"run{processes}"), str(batch), str(out)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        results.append(torch.load(out))
    (loss, gradients), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
