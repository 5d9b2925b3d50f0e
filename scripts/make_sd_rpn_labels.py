#!/usr/bin/env python
# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Make pseudo-labels for SD-RPN: a multimodal model answers questions, and its attention gives the regions.

The paper's labels for LLaVA-1.5-7B, from the first question about each GQA image of LLaVA's instruction data:

    accelerate launch scripts/make_sd_rpn_labels.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dtype bfloat16 \\
        --json_file llava_v1_5_mix665k.json --image_folder data --path_contains gqa --output_dir labels/gqa

One of the official files of attention maps (pickles), without a model; nothing in it is run:

    python scripts/make_sd_rpn_labels.py --model_name_or_path llava-hf/llava-1.5-7b-hf --official_file pseudo.pkl --image_folder data \\
        --output_dir labels/official

Other sources: a dataset of the Hub or a folder of one (`--dataset_name`, with the columns `image` and `question`), or all
images of a folder with one question (`--image_folder`, `--question`). The result, in `output_dir/labels`, is a dataset that
`datasets.load_from_disk` reads and `scripts/train_sd_rpn.py` trains on. Started again with the same arguments it continues
where it was. Several processes share the images.

For a model without a published choice of heads: `--grounding_heads 14:13,24,26 --sink_heads 2:all --rule llava`.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_attn.modeling.sd_rpn.labels.answer_attention import AttentionRecipe, attention_recipe
from hf_attn.modeling.sd_rpn.labels.labelling import BOX_REQUEST, SHORT_ANSWER, label_images
from hf_attn.training import arguments as command_line
from hf_attn.training.arguments import run_script, settings_of
from hf_attn.training.output_folder import OutputFolderError, output_folder
from hf_attn.training.writing import written_whole


try:
    import datasets
    from PIL import Image

    from hf_attn.modeling.sd_rpn.labels.dataset import label_features, official_labels
except ImportError as error:
    raise SystemExit(
        "This script needs the extras `train` and `vision`: pip install 'hf_attn[train,vision]'"
    ) from error

NAME = "make_sd_rpn_labels.py"
stop = partial(command_line.stop, NAME)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class Arguments:
    """Data to label, and the model whose attention is used."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id of a LLaVA or Qwen2.5-VL."})
    output_dir: str = field(metadata={"help": "Output folder for the labels."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the base model: float32, bfloat16, float16 or auto."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    question_column: str = field(default="question", metadata={"help": "Column with the questions."})
    json_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with a list of entries with `image` (a path in --image_folder) and either `question`, "
            "or `conversations` in the format of LLaVA's instruction data, whose first question is used."
        },
    )
    official_file: str | None = field(
        default=None, metadata={"help": "Attention maps written by the official scripts; needs --image_folder."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images."})
    path_contains: str | None = field(
        default=None, metadata={"help": "Use only images whose path contains this string."}
    )
    question: str | None = field(default=None, metadata={"help": "One question for all images in --image_folder."})
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first images."})
    image_kind: str = field(
        default="natural",
        metadata={"help": "Kind of images, for Qwen2.5-VL: natural or text.", "choices": ["natural", "text"]},
    )
    grounding_heads: list[str] | None = field(
        default=None, metadata={"help": "Layers and heads that attend to the object, such as `14:13,24,26 15:2`."}
    )
    sink_heads: list[str] | None = field(
        default=None, metadata={"help": "Layers and heads that identify sinks, such as `16:17,22` or `2:all`."}
    )
    rule: str | None = field(default=None, metadata={"help": "Labelling rule for --grounding_heads: llava or qwen."})
    sink_threshold: float | None = field(
        default=None,
        metadata={"help": "Attention above which a token is a sink. Default: 1e-3 for llava, 1e-2 for qwen."},
    )
    batch_size: int = field(default=8, metadata={"help": "Batch size."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    part_size: int = field(default=500, metadata={"help": "Number of images between two checkpoints."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start a new run; an earlier run in output_dir is kept under another name."}
    )


def parse_arguments(arguments: list[str] | None) -> Arguments:
    """Parse command line arguments, or the JSON file that is the only one of them.

    Raises:
        SystemExit: with a message for the user, if they contradict each other.
    """
    (args,) = command_line.parse_arguments(NAME, Arguments, arguments, __doc__)
    sources = (args.dataset_name, args.json_file, args.official_file, args.question)
    if sum(source is not None for source in sources) != 1:
        raise stop("pass exactly one of --dataset_name, --json_file, --official_file, --question")
    if args.dataset_name is None and args.image_folder is None:
        raise stop("--json_file, --official_file and --question need --image_folder")
    if args.path_contains is not None and (args.dataset_name or args.official_file):
        raise stop("--path_contains needs --json_file or --question")
    if (args.grounding_heads is None) != (args.rule is None):
        raise stop("--grounding_heads and --rule must be used together")
    if args.grounding_heads is None and (args.sink_heads is not None or args.sink_threshold is not None):
        raise stop("--sink_heads and --sink_threshold need --grounding_heads")
    return args


def make_recipe(args: Arguments) -> AttentionRecipe:
    """The published recipe of the base, or the one of the arguments."""
    try:
        if args.grounding_heads is None:
            return attention_recipe(args.model_name_or_path, args.image_kind)
        grounding, sink = parse_heads(args.grounding_heads), parse_heads(args.sink_heads or [])
        if None in grounding.values():
            raise ValueError("`all` is only for --sink_heads.")
        threshold = args.sink_threshold or {"llava": 1e-3, "qwen": 1e-2}.get(args.rule, 0.0)
        return AttentionRecipe(grounding, sink, args.rule, threshold)
    except ValueError as error:
        raise stop(str(error)) from error


def parse_heads(texts: Sequence[str]) -> dict[int, tuple[int, ...] | None]:
    """`["14:13,24", "2:all"]` as `{14: (13, 24), 2: None}`."""
    heads = {}
    for text in texts:
        layer, _, chosen = text.partition(":")
        try:
            heads[int(layer)] = None if chosen == "all" else tuple(map(int, chosen.split(",")))
        except ValueError:
            raise ValueError(f"{text!r} is not a layer with heads; write 14:13,24,26.") from None
    return heads


# --- what to label -------------------------------------------------------------------------------------------------


class Questions(Sequence):
    """Images, as Pillow images or paths, with questions.

    Args:
        rows: the rows.
        image: column of the images.
        question: column of the questions.
        folder: of images that are paths.
    """

    def __init__(self, rows: Sequence[dict], image: str = "image", question: str = "question", folder: str = ""):
        self.rows, self.image, self.question, self.folder = rows, image, question, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        row = self.rows[index]
        image = row[self.image]
        if isinstance(image, str):
            path = Path(self.folder, image)
            if not path.is_file():
                raise stop(f"there is no image {path}")
            image = Image.open(path)
        return image.convert("RGB"), row[self.question]


def load_questions(args: Arguments) -> Questions:
    """What to label.

    Raises:
        SystemExit: with a message for the user, if there is nothing or a column is missing.
    """
    if args.dataset_name is not None:
        questions = Questions(load_rows(args), args.image_column, args.question_column)
    elif args.json_file is not None:
        questions = Questions(list(read_json(args)), folder=args.image_folder)
    else:
        root = Path(args.image_folder)
        files = sorted(
            str(file.relative_to(root)) for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
        )
        rows = [{"image": file, "question": args.question} for file in files if (args.path_contains or "") in file]
        questions = Questions(rows[: args.max_samples], folder=args.image_folder)
    if not len(questions):
        raise stop("there are no images to label")
    return questions


def load_rows(args: Arguments):
    """Rows of a dataset, saved by `save_to_disk`, in another folder or of the Hub."""
    if Path(args.dataset_name, "state.json").is_file() or Path(args.dataset_name, "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(args.dataset_name)
        rows = rows[args.dataset_split] if isinstance(rows, datasets.DatasetDict) else rows
    else:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    for column in (args.image_column, args.question_column):
        if column not in rows.column_names:
            raise stop(f"{args.dataset_name} has no column {column!r}, only {', '.join(rows.column_names)}")
    return rows if args.max_samples is None else rows.select(range(min(args.max_samples, len(rows))))


def read_json(args: Arguments) -> Iterator[dict[str, str]]:
    """Entries of a JSON file that have an image, with their first question."""
    entries = json.loads(Path(args.json_file).read_text(encoding="utf-8"))
    count = 0
    for i, entry in enumerate(entries):
        if "image" not in entry or (args.path_contains or "") not in entry["image"]:
            continue
        if "question" in entry:
            question = entry["question"]
        elif entry.get("conversations"):
            question = entry["conversations"][0]["value"].replace("<image>", "").strip()
        else:
            raise stop(f"entry {i} of {args.json_file} has neither `question` nor `conversations`")
        yield {"image": entry["image"], "question": question}
        count += 1
        if count == args.max_samples:
            return


# --- labelling -----------------------------------------------------------------------------------------------------


def label_parts(args: Arguments, questions: Questions, parts: Path) -> None:
    """Label the parts of this process that are not there yet, each into a folder of its own."""
    state = PartialState()
    recipe = make_recipe(args)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = (
        AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, dtype=args.dtype).eval().to(state.device)
    )
    # Photographs are labelled by the attention of Qwen2.5-VL to a question about boxes.
    asks_for_boxes = recipe.rule == "qwen" and args.image_kind == "natural"
    starts = range(0, len(questions), args.part_size)
    own = starts[state.process_index :: state.num_processes]
    bar = tqdm(total=len(questions), desc="labelling", disable=not state.is_main_process)
    for start in own:
        end = min(start + args.part_size, len(questions))
        folder = parts / f"{start:09d}"
        if not folder.is_dir():
            rows: list[dict[str, Any]] = []
            for first in range(start, end, args.batch_size):
                images, texts = zip(
                    *(questions[i] for i in range(first, min(first + args.batch_size, end))), strict=True
                )
                asked = [text.replace(SHORT_ANSWER, BOX_REQUEST) for text in texts] if asks_for_boxes else None
                labelled = label_images(
                    model, processor, images, texts, recipe, asked=asked, max_new_tokens=args.max_new_tokens
                )
                rows += [row for row in labelled if row is not None]
                bar.update(len(images) * state.num_processes)
            with written_whole(folder) as part:
                datasets.Dataset.from_list(rows, features=label_features()).save_to_disk(part)
    bar.close()


def join_parts(parts: Path, count: int) -> datasets.Dataset:
    """All parts as one dataset."""
    labelled = datasets.concatenate_datasets([datasets.load_from_disk(part) for part in sorted(parts.glob("[0-9]*"))])
    if len(labelled) < count:
        print(
            f"{count - len(labelled)} of {count} images are skipped: their answer is a single token, so there is no "
            "attention map."
        )
    return labelled


def load_official(args: Arguments) -> datasets.Dataset:
    """Labels of the attention maps in an official file."""
    recipe = make_recipe(args)
    try:
        return official_labels(
            args.official_file,
            args.image_folder,
            rule=recipe.rule,
            sink_threshold=recipe.sink_threshold,
            max_samples=args.max_samples,
        )
    except (ValueError, OSError) as error:
        raise stop(str(error)) from error


def save(labelled: datasets.Dataset, target: Path, base: str) -> None:
    """Move a dataset to its destination when it is complete."""
    labelled.info.description = f"Pseudo-labels for SD-RPN by the attention of {base}."
    with written_whole(target) as part:
        labelled.save_to_disk(part)


def describe(labelled: datasets.Dataset) -> str:
    """How much of the images is labelled as what."""
    usable = foreground = cells = 0
    for labels in map(np.asarray, labelled.select_columns("roi_labels")["roi_labels"]):
        usable += bool((labels >= 0).any())
        foreground += int((labels == 1).sum())
        cells += int((labels >= 0).sum())
    share = f"; {foreground / cells:.1%} of their labelled cells are foreground" if cells else ""
    return f"{len(labelled)} images, {usable} with labels that are not all ignored{share}."


def main(arguments: list[str] | None = None) -> datasets.Dataset:
    """Run the script; returns the labels."""
    args = parse_arguments(arguments)
    make_recipe(args)
    questions = None if args.official_file else load_questions(args)
    # Without this setting, accelerate does not connect the processes on a machine without GPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with ExitStack() as stack:
        if state.is_main_process:
            settings = settings_of(args, without=("overwrite_output_dir",))
            try:
                stack.enter_context(output_folder(args.output_dir, settings, args.overwrite_output_dir, command=NAME))
            except OutputFolderError as error:
                raise stop(error) from error
        return label(args, questions, state)


def label(args: Arguments, questions: Questions | None, state: PartialState) -> datasets.Dataset:
    """Label the rows that are not labelled yet; returns the labels."""
    output = Path(args.output_dir)
    parts, target = output / "parts", output / "labels"
    state.wait_for_everyone()
    if not target.is_dir():
        if questions is not None:
            label_parts(args, questions, parts)
            state.wait_for_everyone()
        if state.is_main_process:
            save(
                load_official(args) if questions is None else join_parts(parts, len(questions)),
                target,
                args.model_name_or_path,
            )
            shutil.rmtree(parts, ignore_errors=True)
    state.wait_for_everyone()
    labelled = datasets.load_from_disk(target)
    state.print(describe(labelled))
    state.print(f"The labels were saved to {target}.")
    return labelled


if __name__ == "__main__":
    run_script(NAME, main)
