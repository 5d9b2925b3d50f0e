"""The quickstart: a hybrid attention transformer learns to enlarge photographs better than bicubic interpolation does.

It needs no download and takes two minutes, however busy the machine is, because training has a time limit. It is
evaluated on the right quarters of the photographs, which are not used for training.
"""

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import default_data_collator, pipeline, set_seed
from transformers.utils import logging

from ..architectures.restoration.warm_start import start_as_interpolation
from ..hub import write_model_card
from ..modeling.hat.configuration_hat import HATConfig
from ..modeling.hat.modeling_hat import HATForImageSuperResolution
from ..restoration.metrics import RestorationMetrics, psnr, to_uint8
from ..restoration.pairs import Images, Patches, WholeImages
from ..restoration.resize import bicubic_resize
from ..training.output_folder import output_folder
from ..training.writing import files_written_whole, written_whole
from .photographs import load_photographs
from .threads import use_free_cores


SCALE, PATCH_SIZE, BATCH_SIZE, LEARNING_RATE = 2, 16, 8, 1e-3
SIZES = {
    "embed_dim": 24,
    "depths": [2],
    "num_heads": [2],
    "window_size": 8,
    "compress_ratio": 4,
    "squeeze_factor": 8,
    "upscale": SCALE,
}
#: shares of the training after which the model is measured
MEASUREMENTS = (0.15, 0.35, 0.6, 1.0)
#: held-out photograph of the figure, and the corner and side of the part of its low-resolution version that is shown
SHOWN, CORNER, SIDE = 2, (20, 4), 56


def quickstart(output: str | Path, steps: int | None = None, seconds: float = 90) -> dict[str, Any]:
    """Train a small HAT, compare it with bicubic enlargement, save it for the Hub and load it back.

    Args:
        output: folder for the results; continued if it holds an unfinished run with the same settings.
        steps: optimisation steps, instead of a time.
        seconds: time to train for.

    Returns:
        The measured numbers, which are also in `results.json`.

    Raises:
        ValueError: if the training has no length, or if `output` holds something else.
        ImportError: if the extras with the photographs are not installed.
    """
    if (steps is not None and steps < 1) or not 0 < seconds < math.inf:
        raise ValueError(f"steps or seconds must be positive, got {steps} steps and {seconds} seconds.")
    length = {"seconds": seconds} if steps is None else {"steps": steps}
    with output_folder(output, {"example": "super_resolution", **length}, command="hf-attn quickstart"):
        return _Quickstart(Path(output), **length).run()


class _Quickstart:
    def __init__(self, output: Path, steps: int | None = None, seconds: float = math.inf):
        self.output, self.steps, self.seconds = output, steps, seconds
        self.results_file, self.state_file = output / "results.json", output / "training.pt"
        self.folder = output / "model"

    def run(self) -> dict[str, Any]:
        verbose = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            if self.results_file.is_file():
                results = json.loads(self.results_file.read_text(encoding="utf-8"))
                print("This run is already finished.")
            else:
                results = self.train_and_save()
        finally:
            if verbose:
                logging.enable_progress_bar()
        self.report(results)
        return results

    def train_and_save(self) -> dict[str, Any]:
        threads = use_free_cores()
        print(
            f"\n[1/3] A hybrid attention transformer (HAT) learns to enlarge photographs, on {threads} CPU threads\n"
        )
        set_seed(0)
        photographs = load_photographs()
        self.patches = Patches(Images(photographs, "left"), SCALE, PATCH_SIZE)
        held_out = WholeImages(Images(photographs, "right"), SCALE, 256)
        self.pairs = [held_out[index] for index in range(len(held_out))]
        self.metrics = RestorationMetrics(crop_border=SCALE)
        bicubic = self.measure(lambda images: bicubic_resize(images, SCALE))
        self.model = HATForImageSuperResolution(HATConfig(**SIZES))
        start_as_interpolation(self.model)
        print(
            f"{self.model.num_parameters():,} parameters, {len(photographs)} photographs; their right quarters are held out.\n"
            f"\n{'':14}{'seconds':>9}{'steps':>8}{'PSNR':>10}{'SSIM':>9}\n"
            f"{'bicubic':14}{'':9}{'':8}{bicubic['psnr']:7.2f} dB{bicubic['ssim']:9.4f}",
            flush=True,
        )
        rows = self.train()
        print("\n[2/3] A folder for the Hub, loaded back by `pipeline`\n", flush=True)
        self.save(rows, bicubic)
        results = {"bicubic": bicubic, "hat": rows[-1], "course": rows, **self.draw()}
        with written_whole(self.results_file) as part:
            part.write_text(json.dumps(results, indent=2), encoding="utf-8")
        self.state_file.unlink(missing_ok=True)
        return results

    # --- steps -------------------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, float]]:
        """Train to the end; returns the measurements of the averaged weights, which are the model then."""
        model = self.model.train()
        average = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        rows, step, elapsed = [], 0, 0.0
        if self.state_file.is_file():
            state = torch.load(self.state_file, weights_only=True)
            for part, weights in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
                part.load_state_dict(state[weights])
            rows, step, elapsed = state["rows"], state["step"], state["elapsed"]
        for row in rows:
            _print_row(row)
        with tqdm(total=100, unit="%", leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            while (done := self.share_done(step, elapsed)) < 1 or len(rows) < len(MEASUREMENTS):
                start = time.monotonic()
                rate = LEARNING_RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * min(done, 1))) / 2
                self.optimise(model, optimizer, rate)
                step += 1
                # The average forgets its start quickly, and later follows more slowly.
                decay = min(0.99, step / (step + 10))
                with torch.no_grad():
                    for averaged, weight in zip(average.parameters(), model.parameters(), strict=True):
                        averaged.lerp_(weight, 1 - decay)
                elapsed += time.monotonic() - start
                done = self.share_done(step, elapsed)
                bar.update(min(100, round(100 * done)) - bar.n)
                if len(rows) < len(MEASUREMENTS) and done >= MEASUREMENTS[len(rows)]:
                    self.model = average
                    scores = self.measure(lambda images: average(images[None]).reconstruction[0])
                    rows.append({"seconds": round(elapsed, 1), "steps": step, **scores})
                    bar.clear()
                    _print_row(rows[-1])
                    state = {"model": model.state_dict(), "average": average.state_dict(), "rows": rows}
                    state |= {"optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed}
                    with written_whole(self.state_file) as part:
                        torch.save(state, part)
        self.model = average
        return rows

    def share_done(self, step: int, elapsed: float) -> float:
        return elapsed / self.seconds if self.steps is None else step / self.steps

    def optimise(self, model: HATForImageSuperResolution, optimizer: torch.optim.Optimizer, rate: float) -> None:
        chosen = torch.randint(len(self.patches), (BATCH_SIZE,)).tolist()
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**default_data_collator([self.patches[index] for index in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def measure(self, enlarge) -> dict[str, float]:
        """Mean PSNR and SSIM on the held-out parts."""
        for pair in self.pairs:
            self.metrics.add(enlarge(pair["pixel_values"]), pair["labels"])
        return self.metrics.compute()

    def save(self, rows: list[dict[str, float]], bicubic: dict[str, float]) -> None:
        evaluation = {
            "PSNR on held-out photographs, dB": rows[-1]["psnr"],
            "SSIM": rows[-1]["ssim"],
            "PSNR of bicubic enlargement, dB": bicubic["psnr"],
            "SSIM of bicubic enlargement": bicubic["ssim"],
        }
        training = {"steps": rows[-1]["steps"], "batch size": BATCH_SIZE, "patch size": PATCH_SIZE}
        with files_written_whole(self.folder) as part:
            self.model.save_pretrained(part)
            write_model_card(part, self.model, evaluation=evaluation, training=training)

    def draw(self) -> dict[str, float]:
        """Draw a held-out part enlarged by bicubic interpolation and by the pipeline next to the photograph; returns their PSNR."""
        pair = self.pairs[SHOWN]
        low, original = to_uint8(pair["pixel_values"]), to_uint8(pair["labels"])
        enlarged = pipeline("image-restoration", model=str(self.folder), device="cpu")(low.permute(1, 2, 0).numpy())
        enlarged = torch.from_numpy(np.array(enlarged)).permute(2, 0, 1)
        bicubic = to_uint8(bicubic_resize(pair["pixel_values"], SCALE))
        scores = {"shown_bicubic_psnr": psnr(bicubic, original, SCALE), "shown_psnr": psnr(enlarged, original, SCALE)}
        top, left = (SCALE * corner for corner in CORNER)
        part = (slice(None), slice(top, top + SCALE * SIDE), slice(left, left + SCALE * SIDE))
        panels = {
            f"bicubic, {scores['shown_bicubic_psnr']:.1f} dB": bicubic[part],
            f"HAT, {scores['shown_psnr']:.1f} dB": enlarged[part],
            "photograph": original[part],
        }
        with written_whole(self.output / "comparison.png") as picture:
            _side_by_side(panels).save(picture, format="PNG")
        return scores

    def report(self, results: dict[str, Any]) -> None:
        hat, bicubic = results["hat"], results["bicubic"]
        gain = hat["psnr"] - bicubic["psnr"]
        # 10 dB are a factor of ten in the squared error.
        less = 1 - 10 ** (-gain / 10)
        print(
            f"\n[3/3] On held-out photographs: {hat['psnr']:.2f} dB, bicubic {bicubic['psnr']:.2f} dB ({gain:+.2f} dB, "
            f"{abs(less):.0%} {'less' if less >= 0 else 'more'} squared error)\n\n"
            f"Figure:         {self.output / 'comparison.png'}\n"
            f'Use it:         python -c "import hf_attn; from transformers import pipeline; '
            f"pipeline('image-restoration', model='{self.folder}')('photo.jpg').save('large.png')\"\n"
            f"Push it:        hf upload YOUR-NAME/small-hat {self.folder}\n"
            f"Train longer:   python scripts/run_super_resolution.py --model_type hat --scale 2 --output_dir outputs/hat\n"
            "Another paper:  hf-attn quickstart --example echo_att"
        )


def _print_row(row: dict[str, float]) -> None:
    print(
        f"{'HAT':14}{row['seconds']:9.0f}{row['steps']:8,}{row['psnr']:7.2f} dB{row['ssim']:9.4f}",
        flush=True,
    )


def _side_by_side(panels: dict[str, torch.Tensor], zoom: int = 3):
    """Images `(3, height, width)` next to each other, enlarged pixel by pixel, with their names below."""
    from PIL import Image, ImageDraw

    height, width = (zoom * side for side in next(iter(panels.values())).shape[-2:])
    picture = Image.new("RGB", (len(panels) * (width + 8) - 8, height + 20), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, pixels) in enumerate(panels.items()):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (index * (width + 8), 0))
        draw.text((index * (width + 8) + 2, height + 4), name, fill="black")
    return picture
