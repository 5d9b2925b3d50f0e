"""SD-RPN on planted details: where the network looks, what the first pass costs, what the second look is worth.

Images show coloured squares with fine lines in one of four directions, which are lost at the resolution at which a
small LLaVA of transformers sees the whole image. It is trained first to name the direction of the lines of a square,
from a rough crop of the square, then from the image and the crop. Then it is frozen, and the network of SD-RPN is
trained to find the square that a question names. On held-out images LLaVA answers from the image alone, with the
region that the network finds, with a random region of the same size as the square, and with the square itself, which
is the best possible.

Shown in small if, for every seed and by more than the spread, the regions overlap with the squares more after training
than before, and the answers with the second look are correct more often than those without it and those with a random
region; and if the first pass, at the proportions of LLaVA-1.5-7B, takes less time than the prefill. Contradicted if
the second look makes answers worse in the same sense. Otherwise not shown here.
"""

from functools import cache, partial
from statistics import fmean

import numpy as np
import torch
from torch.nn import functional as F

from ...modeling.sd_rpn.evaluation import box_iou
from ...modeling.sd_rpn.first_pass import run_first_pass
from ...modeling.sd_rpn.generation import SdRpnGenerator
from ...modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from ...modeling.sd_rpn.planted import COLOURS, box_labels, tiny_llava
from ...modeling.sd_rpn.prompts import encode_prompts, read_prompt
from ..drawing import bars
from ..result import Conclusion, Figure, agreement
from ..timing import least_cpu_seconds
from ..training import batches, optimise, tuned


GRID, LAYERS, BRANCH = 8, 4, 2
SIDE, SQUARES, PERIOD = 320, 3, 3
TRAINED, HELD_OUT, BATCH_SIZE = 3000, 200, 16
BASE_RATE, THRESHOLD = 1e-3, 0.5
QUESTION = "Which lines has the {colour} square ?"
#: direction of lines -> coefficients of column and row of a pixel
LINES = {"horizontal": (0, 1), "vertical": (1, 0), "rising": (1, 1), "falling": (1, -1)}
#: proportions of LLaVA-1.5-7B
FULL_GRID, FULL_LAYERS, FULL_BRANCH, FULL_WIDTH = 24, 32, 15, 256


def measure(work) -> dict:
    count, held_out, steps = (16, 8, (2, 2, 2)) if work.miniature else (TRAINED, HELD_OUT, (1000, 300, 2500))
    runs = tuned(work, "network", partial(learn, count, held_out, steps), (1e-3, 3e-3))
    cost = work.part("first-pass", first_pass_and_prefill, 4 if work.miniature else FULL_GRID)
    return {"runs": runs, "milliseconds": cost}


class Planted:
    """An image with a question about one of its squares.

    Attributes:
        image: a Pillow image.
        box: of the square, left, top, right and bottom in pixels.
        question: about its lines.
        answer: index of the correct direction in `LINES`.
    """

    def __init__(self, seed: int, index: int):
        from PIL import Image

        rng = np.random.default_rng((seed, index))
        blocks = rng.normal(120, 25, (SIDE // 16, SIDE // 16, 3)).repeat(16, 0).repeat(16, 1)
        pixels = blocks + rng.integers(-12, 13, (SIDE, SIDE, 1))
        colours, boxes = rng.permutation(list(COLOURS))[:SQUARES], apart(rng)
        directions = rng.integers(len(LINES), size=SQUARES)
        for colour, (left, top, right, bottom), direction in zip(colours, boxes, directions, strict=True):
            across, down = list(LINES.values())[direction]
            rows, columns = np.mgrid[top:bottom, left:right]
            is_line = (across * columns + down * rows) % PERIOD == 0
            shade = np.array(COLOURS[colour])
            pixels[top:bottom, left:right] = np.where(is_line[..., None], 0.2 * shade + 0.8 * 128, shade)
        self.image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        self.box = boxes[0]
        self.question, self.answer = QUESTION.format(colour=colours[0]), int(directions[0])


def apart(rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Squares that do not touch each other."""
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < SQUARES:
        side = int(rng.uniform(0.28, 0.38) * SIDE)
        left, top = rng.integers(SIDE - side, size=2).tolist()
        box = (left, top, left + side, top + side)
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
            boxes.append(box)
        elif len(boxes) == 2 and rng.random() < 0.05:
            boxes = []  # there may be no room for a third one
    return boxes


@cache
def pictures(seed: int, count: int) -> list[Planted]:
    return [Planted(seed, index) for index in range(count)]


def make_base(seed: int):
    """A small LLaVA that knows the words of questions and answers, its processor, and the tokens of the answers."""
    base, processor = tiny_llava(GRID, num_hidden_layers=LAYERS, seed=seed)
    known = processor.tokenizer.get_vocab()
    words = [word for word in (*QUESTION.split(), *LINES) if word not in known and "{" not in word]
    processor.tokenizer.add_tokens(words)
    torch.manual_seed(seed)
    base.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return base, processor, processor.tokenizer.convert_tokens_to_ids(list(LINES))


def encoded(processor, config, some: list[Planted]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(images, length)` of the questions, which have one length, and pixels of the images."""
    prompts = [read_prompt(processor, picture.question, picture.image) for picture in some]
    inputs = encode_prompts(processor, config, prompts)
    if not inputs["attention_mask"].all():
        raise RuntimeError("The questions differ in length.")
    return inputs["input_ids"], inputs["pixel_values"]


def cut_out(processor, picture: Planted, box) -> torch.Tensor:
    """Pixels of a crop, as the second pass makes them."""
    from PIL import Image

    side = GRID * processor.patch_size
    crop = picture.image.crop(tuple(box)).resize((side, side), Image.Resampling.BILINEAR)
    return processor.image_processor(images=[crop], return_tensors="pt")["pixel_values"][0]


def with_crops(input_ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Prompts with the tokens of a crop after those of the image."""
    end = int((input_ids[0] == image_token_id).nonzero()[-1]) + 1
    crops = input_ids.new_full((len(input_ids), GRID**2), image_token_id)
    return torch.cat([input_ids[:, :end], crops, input_ids[:, end:]], 1)


def roughly(rng: np.random.Generator, box) -> list[int]:
    """The box with each side moved by up to a fifth of its width."""
    moves = rng.uniform(-0.2, 0.2, 4) * (box[2] - box[0])
    return [min(SIDE, max(0, int(side + move))) for side, move in zip(box, moves, strict=True)]


def at_random(rng: np.random.Generator, box) -> list[int]:
    """A box of the same size at a random place."""
    size = box[2] - box[0]
    left, top = rng.integers(SIDE - size, size=2).tolist()
    return [left, top, left + size, top + size]


@cache
def training_inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of the questions about the training images, the pixels of the images, and those of their crops."""
    base, processor, _ = make_base(0)
    some, rng = pictures(0, count), np.random.default_rng(0)
    crops = torch.stack([cut_out(processor, picture, roughly(rng, picture.box)) for picture in some])
    return *encoded(processor, base.config, some), crops


@cache
def trained_base(count: int, steps: tuple[int, int], seed: int):
    """The base, trained on this number of images and crops, its processor, and the tokens of the answers."""
    base, processor, answers = make_base(seed)
    input_ids, pixels, crops = training_inputs(count)
    both = with_crops(input_ids, base.config.image_token_id)
    wanted = torch.tensor([picture.answer for picture in pictures(0, count)])
    order = batches(count, BATCH_SIZE, seed)

    def loss(with_picture: bool) -> torch.Tensor:
        chosen = next(order)
        images, ids = crops[chosen], input_ids[chosen]
        if with_picture:
            images, ids = torch.stack([pixels[chosen], images], 1).flatten(0, 1), both[chosen]
        logits = base(input_ids=ids, pixel_values=images, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits[:, answers], wanted[chosen])

    for with_picture, number in enumerate(steps):
        optimise(base, partial(loss, bool(with_picture)), number, BASE_RATE)
    return base.requires_grad_(False).eval(), processor, answers


def make_network(base) -> SdRpnModel:
    return SdRpnModel.from_base(base, branch_layer=BRANCH, num_hidden_layers=2, thresholds={"default": THRESHOLD})


def learn(count: int, held_out: int, steps: tuple[int, int, int], seed: int, rate: float) -> dict[str, float]:
    """Overlap of regions and shares of correct answers in percent, and the loss of the network on images that neither has seen."""
    base, processor, answers = trained_base(count, steps[:2], seed)
    torch.manual_seed(seed)
    network = make_network(base)
    untrained = overlap(regions(base, network, processor, pictures(1, held_out)), pictures(1, held_out))
    states = states_of(base, *training_inputs(count)[:2])
    targets = labels_of(pictures(0, count))
    order = batches(count, BATCH_SIZE, seed)

    def loss() -> torch.Tensor:
        chosen = next(order)
        some = {"hidden_states": states["hidden_states"][chosen], "image_mask": states["image_mask"][chosen]}
        return network(**{**states, **some}, roi_target_map=targets[chosen]).loss

    optimise(network, loss, steps[2], rate)
    with torch.no_grad():
        others = pictures(2, held_out)
        validation = network(
            **states_of(base, *encoded(processor, base.config, others)), roi_target_map=labels_of(others)
        ).loss.item()
        found = regions(base, network, processor, pictures(1, held_out))
        return {
            "validation": validation,
            "untrained": untrained,
            "overlap": overlap(found, pictures(1, held_out)),
            **answered(base, processor, answers, found, pictures(1, held_out), seed),
        }


def states_of(base, input_ids: torch.Tensor, pixels: torch.Tensor) -> dict:
    """Inputs of the network, from the first pass of the base, which does not change."""
    parts = [
        run_first_pass(base, BRANCH, ids, pixel_values=images).rpn_inputs()
        for ids, images in zip(input_ids.split(100), pixels.split(100), strict=True)
    ]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("hidden_states", "image_mask")}
    # Without padding the positions of all prompts are the same.
    return {**joined, "position_embeddings": tuple(table[:1] for table in parts[0]["position_embeddings"])}


def labels_of(some: list[Planted]) -> torch.Tensor:
    return torch.stack([box_labels(picture.box, picture.image.size, GRID).flatten() for picture in some])


def regions(base, network: SdRpnModel, processor, some: list[Planted]) -> list:
    """What the two-pass inference makes of each image: inputs of the second pass, and the boxes."""
    generator = SdRpnGenerator(base, network.eval(), processor)
    return [generator.prepare(picture.question, picture.image) for picture in some]


def overlap(found: list, some: list[Planted]) -> float:
    """Mean IoU in percent of the first box with the square; no box counts as zero."""
    boxes = [focused.images[0][0].boxes for focused in found]
    return 100 * fmean(box_iou(of[0], picture.box) if of else 0.0 for of, picture in zip(boxes, some, strict=True))


def answered(base, processor, answers: list[int], found: list, some: list[Planted], seed: int) -> dict[str, float]:
    """Shares of correct answers in percent, by the images that the base sees."""
    rng = np.random.default_rng(seed)
    input_ids, pixels = encoded(processor, base.config, some)
    both = with_crops(input_ids, base.config.image_token_id)
    wanted = [picture.answer for picture in some]

    def share(inputs: list[dict]) -> float:
        logits = [base(**each, logits_to_keep=1).logits[0, -1, answers] for each in inputs]
        return 100 * fmean(int(each.argmax()) == right for each, right in zip(logits, wanted, strict=True))

    def second_look(boxes: list) -> float:
        crops = [cut_out(processor, picture, box) for picture, box in zip(some, boxes, strict=True)]
        return share(
            [
                {"input_ids": both[index : index + 1], "pixel_values": torch.stack([pixels[index], crop])}
                for index, crop in enumerate(crops)
            ]
        )

    alone = [
        {"input_ids": ids[None], "pixel_values": image[None]} for ids, image in zip(input_ids, pixels, strict=True)
    ]
    return {
        "picture": share(alone),
        "network": share([focused.model_inputs for focused in found]),
        "random": second_look([at_random(rng, picture.box) for picture in some]),
        "square": second_look([picture.box for picture in some]),
    }


def first_pass_and_prefill(grid: int) -> list[float]:
    """Minimum CPU milliseconds of the first pass and of a prefill of the same prompt, by a base of the depth of LLaVA-1.5-7B."""
    base, processor = tiny_llava(grid, FULL_WIDTH, FULL_LAYERS)
    network = SdRpnModel.from_base(base, branch_layer=FULL_BRANCH, num_hidden_layers=3).eval()
    picture = Planted(0, 0)
    prompt = read_prompt(processor, "Where is the red square ?", picture.image)
    inputs = encode_prompts(processor, base.config, [prompt])
    with torch.no_grad():
        features = base.get_image_features(inputs.pop("pixel_values"))
        inputs["mm_encoder_outputs"] = {"image": features}
        calls = [
            lambda: network(**run_first_pass(base, FULL_BRANCH, **inputs).rpn_inputs()),
            lambda: base(**inputs, use_cache=True, logits_to_keep=1),
        ]
        return [1e3 * seconds for seconds in least_cpu_seconds(calls, 5)]


def conclude(data: dict) -> Conclusion:
    names = ("untrained", "overlap", "picture", "network", "random", "square")
    untrained, after, alone, second, anywhere, best = ([run[name] for run in data["runs"]] for name in names)
    first, prefill = data["milliseconds"]
    figures = (
        Figure.of("correct answers with the second look", "%", second, "the image alone", alone),
        Figure.of("correct answers with the second look", "%", second, "a random region", anywhere),
        Figure.of("correct answers with the square itself", "%", best),
        Figure.of("overlap of region and square (IoU)", "%", after, "before training", untrained),
        Figure.of("time of the first pass", "CPU ms", first, "prefill", prefill),
    )
    gain, order, over_random = fmean(second) - fmean(alone), agreement(second, alone), agreement(second, anywhere)
    verdict = "not shown here"
    if order == over_random == agreement(after, untrained) == 1 and first < prefill:
        verdict = "shown in small"
    elif order == -1:
        verdict = "contradicted here"
    words = {1: "more", 0: "not clearly more", -1: "less"}[over_random]
    why = (
        f"The second look changes the share of correct answers by {gain:+.0f} points (chance is {100 / len(LINES):.0f} %), and is {words} useful "
        f"than a random region. The regions overlap with the squares by {fmean(after):.0f} %, and the first pass takes {first / prefill:.0%} of "
        f"the time of a prefill."
    )
    return Conclusion(figures, verdict, why)


def draw(data: dict, figure) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 2, 2))
    figure.set_size_inches(9, 3.6)
    names = {
        "picture": "image\nalone",
        "random": "+ random\nregion",
        "network": "+ region\nfound",
        "square": "+ the\nsquare",
    }
    bars(left, {label: [run[name] for run in data["runs"]] for name, label in names.items()}, "%", "correct answers")
    left.axhline(100 / len(LINES), color="black", linestyle="--", linewidth=1)
    steps = {"untrained": "untrained", "overlap": "trained"}
    bars(
        middle,
        {label: [run[name] for run in data["runs"]] for name, label in steps.items()},
        "%",
        "region and square:\nIoU",
    )
    bars(
        right,
        dict(zip(("first\npass", "prefill"), ([ms] for ms in data["milliseconds"]), strict=True)),
        "CPU ms",
        "time",
    )
