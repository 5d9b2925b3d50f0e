"""scripts/distill_echo_att.py on a tiny teacher."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_attn.modeling.echo_att.distillation import EchoAttDistillationTrainer
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from tests.batteries.scripts import loaded_script
from tests.batteries.text import byte_tokenizer, llama


@pytest.fixture(scope="module")
def script():
    with loaded_script("distill_echo_att") as module:
        yield module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    byte_tokenizer().save_pretrained(folder)
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("Attend, copy, then adjust. " * 40)
    return path


def arguments(teacher, text, output, *more):
    command = (
        f"--model_name_or_path {teacher} --train_file {text} --output_dir {output} --block_size 16 --max_steps 8 "
    )
    command += "--per_device_train_batch_size 4 --save_steps 2 --report_to none --use_cpu true --disable_tqdm true"
    more = more or ("--num_shared", "2")
    return [*command.split(), *map(str, more)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_two_stages_end_in_a_folder_for_the_hub(script, teacher, text, tmp_path, capsys):
    script.main(arguments(teacher, text, tmp_path / "run"))
    refined = tmp_path / "run" / "refined"
    output = capsys.readouterr().out
    assert "with the layer before" in output
    assert f"The student was saved to {refined}." in output
    student = AutoModelForCausalLM.from_pretrained(refined)
    assert isinstance(student, EchoAttForCausalLM)
    assert len(student.config.shared_layers) == 2
    assert {"README.md", "modeling_hf_attn.py", "tokenizer.json"} <= {path.name for path in refined.iterdir()}
    distilled = weights(tmp_path / "run" / "distilled")
    assert any(not torch.equal(tensor, distilled[name]) for name, tensor in weights(refined).items())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_and_restarted_it_ends_with_the_same_weights(script, teacher, text, tmp_path, stage, monkeypatch):
    options = ("--shared_layers", 1, 3, "--refinement_ratio", 0.5)
    script.main(arguments(teacher, text, tmp_path / "whole", *options))

    def killed(trainer, *positional, **kwargs):
        result = step(trainer, *positional, **kwargs)
        if trainer.args.output_dir.endswith(stage) and trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return result

    trainer_class = {"stage1": EchoAttDistillationTrainer, "stage2": script.RefinementTrainer}[stage]
    step = trainer_class.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_class, "training_step", killed)
        script.main(arguments(teacher, text, tmp_path / "resumed", *options))
    assert not (tmp_path / "resumed" / "refined").exists()
    script.main(arguments(teacher, text, tmp_path / "resumed", *options))
    for folder in ("distilled", "refined"):
        expected, resumed = (weights(tmp_path / run / folder) for run in ("whole", "resumed"))
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), (folder, name)


def test_what_is_in_the_output_folder_is_not_overwritten_unasked(script, teacher, text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = ("--shared_layers", 1, "--refinement_ratio", 0)
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(SystemExit, match="not empty and contains no run of hf_attn"):
            script.main(arguments(teacher, text, tmp_path, *options, *more))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    script.main(arguments(teacher, text, tmp_path / "run", *options))
    other = arguments(teacher, text, tmp_path / "run", "--shared_layers", 2, "--refinement_ratio", 0)
    with pytest.raises(SystemExit, match=r"other settings: shared_layers \(\[1\] -> \[2\]\).*--overwrite_output_dir"):
        script.main(other)
    script.main([*other, "--overwrite_output_dir"])
    shared = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "distilled").config.shared_layers
        for name in ("run.earlier-1", "run")
    ]
    assert shared == [[1], [2]]


def test_a_student_with_another_vocabulary_is_refused(script, teacher, text, tmp_path):
    EchoAttForCausalLM.from_base(llama(vocab_size=300), shared_layers=[1]).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="vocab_size is 257 in the teacher and 300 in the student"):
        script.main(arguments(teacher, text, tmp_path / "run", "--student", tmp_path / "student"))


def test_an_unsupported_teacher_names_the_supported_ones(script, teacher, text, tmp_path):
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast.from_pretrained(teacher).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match="Supported bases: llama"):
        script.main(arguments(folder, text, tmp_path / "run", "--shared_layers", 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--learning_rate", "1e-4"), "exactly one of --num_shared, --shared_layers and --student"),
        (("--num_shared", 1, "--shared_layers", 2), "exactly one of --num_shared"),
        (("--num_shared", 1, "--loss_weights", 1, 2), "needs three numbers"),
    ],
)
def test_contradicting_arguments(script, teacher, text, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments(teacher, text, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
