#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a Llama-like model to landmark attention on plain text, and compare it with its base (arXiv 2305.16300).

    python scripts/run_landmark.py --output_dir outputs/landmark --learning_rate 2e-4 --max_minutes 30

takes SmolLM2-135M-Instruct and the topics of Python's documentation; `--model_name_or_path` and `--dataset_name` take anything
else. The evaluation prints, for the base and for the landmark model, the perplexity of held-out text by the length of the context, and the
pass-key test, whose plot it draws. The landmark model retrieves `--cache_top_k` blocks, the base attends to everything.
To evaluate again, or at other lengths:

    python scripts/run_landmark.py --do_eval --model_name_or_path outputs/landmark --output_dir outputs/landmark \\
        --evaluate landmark --passkey_lengths 16384 --passkey_trials 1

If only one model is evaluated, the tables and the plot include earlier results of the other model in the folder.

Several GPUs, the paper's schedule:

    accelerate launch --config_file scripts/configs/landmark_fsdp.yaml scripts/run_landmark.py --bf16 true \\
        --model_name_or_path huggyllama/llama-7b --mem_freq 50 --dataset_name togethercomputer/RedPajama-Data-1T-Sample \\
        --validation_file held_out.txt --max_steps 15000 --per_device_train_batch_size 2 \\
        --gradient_accumulation_steps 8 --output_dir outputs/llama-landmark

See `--help` for the arguments of this script, and transformers' `TrainingArguments` for the others.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from hf_attn.analysis.context_perplexity import perplexity_by_context
from hf_attn.analysis.passkey import PasskeyAnswer, PasskeyResult, passkey_test, plot_passkey
from hf_attn.examples.assets import read_texts, smollm2_folder, token_blocks
from hf_attn.hub import HubTrainerMixin
from hf_attn.modeling.landmark.cache import RETRIEVALS, LandmarkCache
from hf_attn.modeling.landmark.data import LandmarkDataCollator
from hf_attn.modeling.landmark.insertion import check_landmark_token
from hf_attn.modeling.landmark.modeling_landmark import LandmarkForCausalLM
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import RunArguments, run_script, settings_of, training_folder
from hf_attn.training.writing import written_whole


NAME = "run_landmark.py"
stop = partial(command_line.stop, NAME)

BASE, LANDMARK = "base", "landmark"

#: fields of a new landmark model that can be set
BLOCKS = {"mem_freq": 63, "train_context_length": 512, "include_landmark_in_loss": True}


@dataclass
class ModelArguments:
    """The base, and how blocks are made of its text, which a landmark model has in its configuration."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Base model: folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 model (default: "
            "SmolLM2-135M-Instruct), or a landmark model to train further or to evaluate."
        },
    )
    mem_freq: int | None = field(
        default=None,
        metadata={"help": "Regular tokens per block. Default: 63 (paper: 50), for kernels with blocks of 64."},
    )
    train_context_length: int | None = field(
        default=None, metadata={"help": "Tokens per training sequence, landmarks included. Default: 512."}
    )
    include_landmark_in_loss: bool | None = field(
        default=None, metadata={"help": "Whether the loss includes landmarks as targets. Default: true."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the landmark model in training."}
    )


@dataclass
class DataArguments:
    """Plain text; without a dataset and files, the topics of Python's own documentation."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub id of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Text file to evaluate on, instead of the dataset's split `validation`."}
    )


@dataclass
class EvaluationArguments:
    """Arguments of the evaluation after training."""

    evaluate: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Models to evaluate: {BASE}, {LANDMARK}. Default: both, or only {LANDMARK} if "
            "--model_name_or_path is a landmark model."
        },
    )
    perplexity_lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192],
        metadata={"help": "Context lengths for the perplexity of the held-out text."},
    )
    passkey_lengths: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096, 8192],
        metadata={"help": "Lengths of the pass-key prompts in tokens."},
    )
    passkey_depths: list[float] = field(
        default_factory=lambda: [0.1, 0.5, 0.9],
        metadata={"help": "Positions of the pass key, as fractions of the text."},
    )
    passkey_trials: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "Number of prompts for each length and depth: one number, or one per length."},
    )
    cache_top_k: int = field(
        default=4, metadata={"help": "Number of blocks that the landmark model retrieves per token and head."}
    )
    retrieval: str = field(
        default="per_token_and_head", metadata={"help": f"Granularity of retrieval: {', '.join(RETRIEVALS)}."}
    )
    offload_cache_to_cpu: bool = field(default=False, metadata={"help": "Keep the blocks in CPU memory."})


@dataclass
class ScriptTrainingArguments(RunArguments):
    """transformers' arguments with the paper's defaults; trains and evaluates unless --do_train or --do_eval is given."""

    learning_rate: float = field(
        default=2e-5, metadata={"help": "Default: the paper's, for 15,000 steps of LLaMA-7B."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up steps, or their fraction of all steps if below 1."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict | str = field(
        default_factory=lambda: {"num_cycles": 0.4},
        metadata={
            "help": "Arguments of the schedule. Default: the cosine ends at about a tenth of the learning rate."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop training after this time, even if the schedule is not finished."}
    )


class Trainer(HubTrainerMixin, transformers.Trainer):
    """Writes the model card of the family."""


class TimeLimit(TrainerCallback):
    """Ends the training after a time."""

    def __init__(self, minutes: float):
        self.minutes = minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + 60 * self.minutes

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() >= self.end


def parse_arguments(
    arguments: list[str] | None,
) -> tuple[ModelArguments, DataArguments, EvaluationArguments, ScriptTrainingArguments]:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    classes = (ModelArguments, DataArguments, EvaluationArguments, ScriptTrainingArguments)
    parsed = command_line.parse_arguments(NAME, classes, arguments, __doc__)
    training_args = parsed[-1]
    command_line.prepare_run(NAME, training_args)
    problem = _problem(*parsed)
    if problem is not None:
        raise stop(problem)
    return parsed


def _problem(
    model_args: ModelArguments,
    data_args: DataArguments,
    evaluation_args: EvaluationArguments,
    training_args: ScriptTrainingArguments,
) -> str | None:
    """The error in the arguments, None if there is none."""
    blocks = {name: value for name, value in vars(model_args).items() if name in BLOCKS and value is not None}
    is_landmark = is_landmark_model(model_args.model_name_or_path)
    if evaluation_args.evaluate is None:
        evaluation_args.evaluate = [LANDMARK] if is_landmark else [BASE, LANDMARK]
    if is_landmark and BASE in evaluation_args.evaluate:
        return f"--model_name_or_path is a landmark model; to evaluate its {BASE}, pass the {BASE} model instead"
    if is_landmark and blocks:
        return f"--{', --'.join(blocks)}: the landmark model of --model_name_or_path has its own setting"
    mem_freq, context, _ = {**BLOCKS, **blocks}.values()
    if context < 2 * (mem_freq + 1):
        return (
            f"--train_context_length {context} is too short for two blocks of {mem_freq + 1} tokens (--mem_freq "
            f"{mem_freq} and a landmark), so no landmark would be trained"
        )
    if data_args.dataset_name is not None and data_args.train_file is not None:
        return "pass either --dataset_name or --train_file"
    if data_args.train_file is not None and data_args.validation_file is None:
        return "--train_file needs a --validation_file"
    for name in ("train_file", "validation_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():
            return f"--{name} {path} does not exist"
    if unknown := set(evaluation_args.evaluate) - {BASE, LANDMARK}:
        return f"--evaluate must be {BASE} or {LANDMARK}, got {', '.join(sorted(unknown))}"
    if evaluation_args.retrieval not in RETRIEVALS:
        return f"--retrieval {evaluation_args.retrieval} is not one of {', '.join(RETRIEVALS)}"
    if len(evaluation_args.passkey_trials) not in (1, len(evaluation_args.passkey_lengths)):
        return "--passkey_trials must be one number, or one per value of --passkey_lengths"
    if not training_args.do_train and LANDMARK in evaluation_args.evaluate and not is_landmark:
        return "--do_eval without --do_train needs a landmark model as --model_name_or_path, or --evaluate base"
    return None


def is_landmark_model(name: str | None) -> bool:
    """Whether a folder or Hub id holds a landmark model."""
    try:
        return name is not None and AutoConfig.from_pretrained(name).model_type == "landmark"
    except (OSError, ValueError) as error:
        raise stop(f"--model_name_or_path {name} cannot be loaded: {error}") from error


def texts_of(data_args: DataArguments, split: str) -> list[str]:
    """Texts to train on, or those that are held out."""
    file = data_args.train_file if split == "train" else data_args.validation_file
    if data_args.dataset_name is None:
        return read_texts("train" if split == "train" else "test", file=file)
    return read_texts(split, data_args.dataset_name, data_args.dataset_config_name, data_args.text_column, file)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments, source: str
) -> None:
    """Make the landmark model of the base, or load one, train it and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if is_landmark_model(source):
        model = LandmarkForCausalLM.from_pretrained(source, dtype=torch.float32)
        check_landmark_token(tokenizer, model.config)
    else:
        model = LandmarkForCausalLM.from_base(
            source,
            tokenizer=tokenizer,
            dtype=torch.float32,
            **{name: given if (given := getattr(model_args, name)) is not None else BLOCKS[name] for name in BLOCKS},
        )
        PartialState().print(model.base_report)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    config = model.config
    regular = config.train_context_length // config.block_size * config.mem_freq
    blocks = token_blocks(texts_of(data_args, "train"), tokenizer, regular)
    PartialState().print(
        f"{len(blocks):,} sequences of {regular} tokens with a landmark after every {config.mem_freq}"
    )
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=[{"input_ids": block} for block in blocks],
        data_collator=LandmarkDataCollator(config, pad_token_id=padding or 0),
        processing_class=tokenizer,
        callbacks=[TimeLimit(training_args.max_minutes)] if training_args.max_minutes is not None else [],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = {**result.metrics, "steps": trainer.state.global_step}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    card = {"dataset_tags": data_args.dataset_name, "finetuned_from": model_args.model_name_or_path}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


# --- evaluation ----------------------------------------------------------------------------------------------------


def evaluate(
    data_args: DataArguments,
    evaluation_args: EvaluationArguments,
    training_args: ScriptTrainingArguments,
    given: str,
) -> None:
    """Evaluate the models, with one file for each, and report the results in the folder."""
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in evaluation_args.evaluate:
        source = output if name == LANDMARK and training_args.do_train else given
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).to(training_args.device)
        if isinstance(model, LandmarkForCausalLM):
            check_landmark_token(tokenizer, model.config)
        held_out = token_blocks(texts_of(data_args, "validation"), tokenizer, 1).flatten()
        print(f"Evaluating the {name} model")
        result = {
            "perplexity": measure_perplexity(model, held_out, evaluation_args),
            "passkey": [asdict(answer) for answer in measure_passkey(model, tokenizer, evaluation_args).answers],
        }
        with written_whole(output / f"evaluation_{name}.json") as part:
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(output)


def measure_perplexity(
    model: PreTrainedModel, held_out: torch.Tensor, evaluation_args: EvaluationArguments
) -> dict[int, float]:
    """Perplexity by context length, as far as the text is long enough."""
    lengths = [length for length in evaluation_args.perplexity_lengths if length <= len(held_out)]
    if len(lengths) < len(evaluation_args.perplexity_lengths):
        print(f"The held-out text has {len(held_out):,} tokens, so perplexity is not measured for longer contexts.")
    if not lengths:
        return {}
    if not isinstance(model, LandmarkForCausalLM):
        return perplexity_by_context(model, held_out, lengths)

    def make_cache() -> LandmarkCache:
        return LandmarkCache(
            model.config,
            top_k=evaluation_args.cache_top_k,
            retrieval=evaluation_args.retrieval,
            offload_to_cpu=evaluation_args.offload_cache_to_cpu,
        )

    return perplexity_by_context(model, held_out, lengths, make_cache, insert_landmarks=True)


def measure_passkey(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation_args: EvaluationArguments
) -> PasskeyResult:
    memory = {}
    if isinstance(model, LandmarkForCausalLM):
        names = ("cache_top_k", "retrieval", "offload_cache_to_cpu")
        memory = {name: getattr(evaluation_args, name) for name in names}
    trials = evaluation_args.passkey_trials
    return passkey_test(
        model,
        tokenizer,
        evaluation_args.passkey_lengths,
        evaluation_args.passkey_depths,
        trials[0] if len(trials) == 1 else trials,
        **memory,
    )


def report(output: Path) -> None:
    """Print the tables of all models that were evaluated into a folder, and draw the plot."""
    found = {name: output / f"evaluation_{name}.json" for name in (BASE, LANDMARK)}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}
    lengths = sorted({int(length) for result in results.values() for length in result["perplexity"]})
    if lengths:
        print("\nPerplexity of the held-out text by context length")
        print(f"{'tokens':>7}" + "".join(f"{name:>10}" for name in results))
    for length in lengths:
        values = (result["perplexity"].get(str(length)) for result in results.values())
        print(f"{length:>7}" + "".join(f"{'-':>10}" if value is None else f"{value:>10.2f}" for value in values))
    passkeys = {
        name: PasskeyResult(tuple(PasskeyAnswer(**answer) for answer in result["passkey"]))
        for name, result in results.items()
        if result["passkey"]
    }
    for name, result in passkeys.items():
        print(f"\nPass-key test of the {name} model, correct answers by position of the pass key\n{result}")
    if passkeys:
        try:
            plot_passkey(passkeys, output / "passkey.png")
        except ImportError as error:
            print(f"\nNo plot: {error}")
        else:
            print(f"\nThe plot is in {output / 'passkey.png'}.")


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, evaluation_args, training_args = parse_arguments(arguments)
    only_evaluates = not training_args.do_train
    settings = settings_of(model_args, data_args)
    # An evaluation adds to the results of an earlier one, or of the training.
    with training_folder(NAME, training_args, settings, continues=False, adds=only_evaluates):
        set_seed(training_args.seed)
        with training_args.main_process_first(desc="fetching the base"):
            source = model_args.model_name_or_path or str(smollm2_folder())
        if training_args.do_train:
            train(model_args, data_args, training_args, source)
        if training_args.do_eval and PartialState().is_main_process:
            evaluate(data_args, evaluation_args, training_args, source)


if __name__ == "__main__":
    run_script(NAME, main)
