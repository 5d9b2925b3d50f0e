"""Command lines of the scripts: each mistake gives one line that says what to write instead."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import LlamaConfig, TrainingArguments

from hf_attn.training.arguments import parse_arguments, parse_overrides, resolve_resume, run_script
from tests.batteries.scripts import SCRIPTS, loaded_script


#: those with the arguments of `hf_attn.training.arguments`
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "make_docs")


@dataclass
class Arguments:
    output_dir: str
    model_name_or_path: str | None = None
    block_size: int = 8
    lengths: list[int] = field(default_factory=lambda: [1])
    quick: bool = False
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})


def parse(*arguments):
    (parsed,) = parse_arguments("x.py", Arguments, arguments)
    return parsed


def test_a_command_line_and_a_file_say_the_same(tmp_path):
    given = {"output_dir": "-o", "block_size": 3, "lengths": [2, 4], "quick": True, "model_name_or_path": None}
    (tmp_path / "run.json").write_text(json.dumps(given))
    line = ("--output_dir=-o", "--block-size", "3", "--lengths", "2", "4", "--quick")
    assert parse(str(tmp_path / "run.json")) == parse(*line) == Arguments("-o", None, 3, [2, 4], True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blok_size", "3"), "there is no argument --blok_size; did you mean --block_size?"),
        (("--Block-Size=3",), "there is no argument --Block-Size; did you mean --block_size?"),
        (("--block", "3"), "there is no argument --block; did you mean --block_size?"),
        (("--colour", "red"), "there is no argument --colour (--help lists the arguments)."),
        (("--base", "x"), "--base is now called --model_name_or_path."),
        (("stray",), "'stray' does not belong to an argument"),
        (("--block_size", "many"), "argument --block_size/--block-size: invalid int value: 'many'"),
        (("--block_size", "0"), "--block_size=0 is out of range: it must be at least 1."),
        (("--kind", "c"), "invalid choice: 'c'"),
        ((), "arguments are required: --output_dir"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    complete = arguments if not arguments else ("--output_dir", "o", *arguments)
    with pytest.raises(SystemExit) as stopped:
        parse(*complete)
    assert message in stopped.value.code
    assert stopped.value.code.startswith("x.py: error: ")
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"blok_size": 1}', "did you mean --block_size?"), ("[]", "must contain an object"), ("{", "cannot be read")],
)
def test_mistakes_in_a_file(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        parse(str(tmp_path / "run.json"))
    with pytest.raises(SystemExit, match="cannot be read"):
        parse(str(tmp_path / "missing.json"))


def test_a_number_of_steps_that_trainer_would_take_for_none(tmp_path):
    for steps in ("0", "-2"):
        with pytest.raises(SystemExit, match=f"--max_steps={steps} is out of range"):
            parse_arguments("x.py", TrainingArguments, ["--output_dir", str(tmp_path), "--max_steps", steps])


def test_overrides_of_a_configuration():
    given = ["hidden_size=3", "hidden_act=gelu", 'rope_parameters={"rope_theta": 2}']
    parsed = parse_overrides("x.py", given, LlamaConfig)
    assert parsed == {"hidden_size": 3, "hidden_act": "gelu", "rope_parameters": {"rope_theta": 2}}
    with pytest.raises(SystemExit, match=r"has no field 'hiden_size'; did you mean hidden_size\?"):
        parse_overrides("x.py", ["hiden_size=3"], LlamaConfig)
    with pytest.raises(SystemExit, match="takes name=value, got 'hidden_size'"):
        parse_overrides("x.py", ["hidden_size"], LlamaConfig)


def test_resuming(tmp_path):
    class Given:
        output_dir, resume_from_checkpoint, overwrite_output_dir = str(tmp_path), "last", False

    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        resolve_resume("x.py", Given)
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    resolve_resume("x.py", Given)
    assert Given.resume_from_checkpoint == str(tmp_path / "checkpoint-10")
    Given.overwrite_output_dir = True
    with pytest.raises(SystemExit, match="pass only one of them"):
        resolve_resume("x.py", Given)


@pytest.mark.parametrize(
    "error", [ValueError("no\n such model"), OSError("no\n such model"), ImportError("no such model")]
)
def test_what_stops_a_script_is_one_line(error, caplog):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script("x.py", fail)
    assert stopped.value.code == "x.py: error: no such model"
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_an_interruption_and_a_fault_of_ours_keep_their_kind():
    def raise_error(error):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script("x.py", lambda: raise_error(KeyboardInterrupt()))
    assert stopped.value.code == 130
    with pytest.raises(KeyError):
        run_script("x.py", lambda: raise_error(KeyError("fault")))


@pytest.mark.parametrize("name", NAMES)
def test_every_script_reports_mistakes_alike(name, capsys, tmp_path):
    # Loaded under another name, because other tests load the scripts as well.
    with loaded_script(name, f"manners_{name}") as module:
        assert Path(module.NAME).stem == name
        with pytest.raises(SystemExit) as stopped:
            module.main(["--output_dir", str(tmp_path / "out"), "--overwrite_output_di"])
        assert stopped.value.code == (
            f"{name}.py: error: there is no argument --overwrite_output_di; did you mean --overwrite_output_dir?"
        )
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "an earlier run" in text
        # The argument for the base model has only one name.
        assert "--base" not in text
        assert "--teacher " not in text
