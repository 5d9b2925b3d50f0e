"""scripts/distill_clear.py on its tiny FLUX."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from hf_attn.patching.clear.distillation_data import SampleFolder, generate_samples
from hf_attn.patching.clear.example import tiny_flux_pipeline
from hf_attn.patching.clear.weights import load_clear_weights
from tests.batteries.scripts import SCRIPTS, loaded_script


SCRIPT = SCRIPTS / "distill_clear.py"
SMALL = [
    "--num_samples",
    "10",
    "--num_held_out",
    "4",
    "--resolution",
    "8",
    "--num_inference_steps",
    "2",
    "--teacher_steps",
    "2",
    "--batch_size",
    "3",
    "--max_steps",
    "4",
    "--eval_steps",
    "2",
    "--checkpoint_steps",
    "1",
]


@pytest.fixture(scope="module")
def script():
    with loaded_script("distill_clear") as module:
        yield module


@pytest.fixture(autouse=True)
def without_process_group():
    """Reset Accelerate's state, which is global to the process."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(script, folder, *more):
    return script.main([*SMALL, "--output_dir", str(folder), *map(str, more)])


def weights(folder):
    return load_file(folder / "clear.safetensors")


def test_it_ends_in_weights_that_have_the_error_of_the_curve(script, tmp_path, capsys):
    curve = run(script, tmp_path / "run", "--down_factor", 2)
    assert [row["step"] for row in curve] == [0, 2, 4]
    assert json.loads((tmp_path / "run" / "curve.json").read_text()) == curve
    assert (tmp_path / "run" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "attention is compared in single_transformer_blocks.3.attn" in capsys.readouterr().out

    pipe = FluxPipeline.from_pretrained(tmp_path / "run" / "teacher")
    student = FluxPipeline.from_pretrained(tmp_path / "run" / "teacher").transformer
    report = load_clear_weights(student, tmp_path / "run")
    assert (report.radius, report.down_factor) == (2, 2)
    before = dict(pipe.transformer.named_parameters())
    assert any(
        not torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items() if name in before
    )
    samples = SampleFolder(tmp_path / "run" / "data" / "samples", 10)
    sigmas = torch.linspace(1, 0.001, 1000)
    first = 1 << 32
    batches = [
        script.noisy_batch(samples, indices, sigmas, [first + i for i in indices], "cpu")
        for indices in ([6, 7, 8], [9])
    ]
    measured = script.measure(script.ClearDistillation(student, pipe.transformer), batches, 3.5)
    assert measured["error"] == pytest.approx(curve[-1]["error"], rel=1e-4)
    assert curve[-1]["error"] != curve[0]["error"]


@pytest.mark.slow
def test_the_student_learns(script, tmp_path):
    options = "--num_samples 64 --num_held_out 16 --resolution 16 --teacher_steps 200 --batch_size 16 --max_steps 75"
    curve = run(script, tmp_path, *options.split(), "--eval_steps", 25, "--checkpoint_steps", 75)
    assert curve[0]["error"] > 0.1 * curve[0]["teacher_power"]
    assert curve[-1]["error"] < 0.6 * curve[0]["error"]


def test_killed_and_restarted_it_ends_with_the_same_weights(script, tmp_path, monkeypatch):
    options = ("--gradient_accumulation_steps", 2)
    whole = run(script, tmp_path / "whole", *options)

    get = script.Batches.get

    def killed(batches, step, accumulated):
        if (step, accumulated) == (3, 1):
            raise KeyboardInterrupt
        return get(batches, step, accumulated)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Batches, "get", killed)
        run(script, tmp_path / "resumed", *options)
    assert not (tmp_path / "resumed" / "clear.safetensors").exists()
    assert [path.name for path in (tmp_path / "resumed" / "checkpoints").iterdir()] == ["step_3"]
    assert run(script, tmp_path / "resumed", *options) == whole
    expected, resumed = (weights(tmp_path / name) for name in ("whole", "resumed"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_only_what_the_paper_trains_changes(script, tmp_path):
    run(script, tmp_path / "run")
    names = weights(tmp_path / "run").keys()
    # one double block with an output projection, four single ones without; weight and bias of each
    assert len(names) == 8 + 4 * 6
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step_4" / "model.safetensors")
    teacher = FluxPipeline.from_pretrained(tmp_path / "run" / "teacher").transformer.state_dict()
    changed = {name for name, tensor in teacher.items() if not torch.equal(checkpoint[f"student.{name}"], tensor)}
    assert changed == names


@pytest.mark.slow
def test_two_processes_do_what_one_with_both_batches_does(script, tmp_path):
    # AdamW takes steps of the size of the learning rate for any gradient, even for rounding error.
    options = ["--max_steps", "2", "--checkpoint_steps", "2", "--learning_rate", "1e-4"]
    run(script, tmp_path / "one", "--batch_size", 6, *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [*SMALL, *options, "--output_dir", str(tmp_path / "two"), "--batch_size", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr
    settings = json.loads((tmp_path / "two" / "_hf_attn_run.json").read_text())["settings"]
    assert settings["num_processes"] == 2
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 2
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    expected, computed = (weights(tmp_path / name) for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(computed[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_is_in_the_output_folder_is_not_overwritten_unasked(script, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(SystemExit, match="not empty and contains no run of hf_attn"):
            run(script, tmp_path, *more)
    run(script, tmp_path / "run", "--max_steps", 1)
    with pytest.raises(SystemExit, match=r"other settings: radius \(2 -> 3\)"):
        run(script, tmp_path / "run", "--max_steps", 1, "--radius", 3)


def test_several_runs_share_the_images_of_a_teacher(script, tmp_path, monkeypatch):
    tiny_flux_pipeline().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("up\n\nleft\n")
    options = [
        "--model_name_or_path",
        tmp_path / "teacher",
        "--prompts",
        tmp_path / "prompts.txt",
        "--data_dir",
        tmp_path / "data",
    ]
    options += ["--max_steps", 1, "--resolution", 32, "--checkpoint_steps", 1]
    run(script, tmp_path / "one", *options)
    monkeypatch.setattr(FluxPipeline, "__call__", None)  # nothing is generated again
    run(script, tmp_path / "two", *options, "--radius", 3)
    assert len(list((tmp_path / "data" / "samples").iterdir())) == 10
    assert (tmp_path / "two" / "clear.safetensors").exists() and not (tmp_path / "two" / "data").exists()
    (tmp_path / "prompts.txt").write_text("down\n")
    with pytest.raises(SystemExit, match="data contains a run with other settings: prompts"):
        run(script, tmp_path / "three", *options)


def test_prodigy_gets_the_official_settings(script, tmp_path, monkeypatch):
    class Module:
        @staticmethod
        def Prodigy(parameters, **settings):
            return settings

    options = script.parse_arguments(
        ["--output_dir", str(tmp_path), "--optimizer", "prodigy", "--learning_rate", "1"]
    )[1]
    monkeypatch.setitem(sys.modules, "prodigyopt", Module)
    assert script.make_optimizer([], options) == {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "weight_decay": 1e-4,
        "decouple": True,
        "use_bias_correction": True,
        "safeguard_warmup": True,
    }
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(SystemExit, match="pip install prodigyopt"):
        script.make_optimizer([], options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model_name_or_path", "somewhere"), "--model_name_or_path and --prompts must be used together"),
        (("--model_name_or_path", "somewhere", "--prompts", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--num_held_out", 10), "less than --num_samples"),
        (("--optimizer", "sgd"), "adamw or prodigy, got sgd"),
        (("--down_factor", 3), "multiple of 6 pixels, got 8"),
        (("--radius", 0), "--radius=0 is out of range: it must be at least 1"),
        (("--batch_size", -1), "--batch_size=-1 is out of range"),
        (("--checkpoint_steps", 0), "--checkpoint_steps=0 is out of range"),
    ],
)
def test_contradicting_arguments(script, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run(script, tmp_path / "run", *more)


# --- samples -----------------------------------------------------------------------------------------------------------


def generate(pipe, folder, prompts, **options):
    arguments = {"height": 8, "width": 12, "num_inference_steps": 2, "max_sequence_length": 4, **options}
    generate_samples(pipe, prompts, folder, **arguments)
    return SampleFolder(folder, len(prompts))


def test_a_sample_is_what_the_pipeline_makes_of_its_prompt(tmp_path):
    pipe = tiny_flux_pipeline()
    samples = generate(pipe, tmp_path, ["up", "left", "up"], batch_size=2, seed=5)
    image = pipe(
        "left",
        height=8,
        width=12,
        num_inference_steps=2,
        max_sequence_length=4,
        generator=torch.Generator().manual_seed(6),
        output_type="pt",
    ).images
    latents = samples[1]["latents"][None] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    torch.testing.assert_close(decoded, image, rtol=1e-4, atol=1e-4)
    assert not torch.equal(samples[0]["latents"], samples[2]["latents"])
    assert torch.equal(samples[0]["encoder_hidden_states"], samples[2]["encoder_hidden_states"])


def test_what_is_there_is_kept_and_processes_share_the_work(tmp_path):
    pipe, prompts = tiny_flux_pipeline(), ["up", "left", "down"]
    expected = generate(pipe, tmp_path / "one", prompts)
    for process in (1, 0):
        with (
            pytest.raises(FileNotFoundError, match="lacks 2 of 3 samples, such as 000000")
            if process
            else nullcontext()
        ):
            generate(pipe, tmp_path / "two", prompts, process_index=process, num_processes=2)
    samples = SampleFolder(tmp_path / "two", 3)
    for i in range(3):
        torch.testing.assert_close(samples[i], expected[i])
    stamps = [path.stat().st_mtime_ns for path in samples.paths]
    generate(pipe, tmp_path / "two", prompts)
    assert [path.stat().st_mtime_ns for path in samples.paths] == stamps
