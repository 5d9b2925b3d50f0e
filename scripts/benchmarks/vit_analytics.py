# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Leave-one-out over the heads of a 12 x 12 ViT: runs that begin at the layer of the head, against full forward passes.

- Time: one batch, all 144 heads, against 144 full passes with a head gated by a hook, of which 36 are run, in turns with the
  other side. The runs of a layer count by their median.
- Memory: what the process grows by at most while attention is averaged over 64 images and the heads of one batch are left out, in batches
  of four, against keeping the maps of all images.

    OMP_NUM_THREADS=1 python scripts/benchmarks/vit_analytics.py --json vit_analytics.json
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from _common import peak_memory, print_table, run_fresh, write_json
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_attn.analysis.vit.gating import without_heads
from hf_attn.analysis.vit.layout import ViTLayout
from hf_attn.analysis.vit.maps import MeanMaps
from hf_attn.analysis.vit.pruning import PruningSums
from hf_attn.analysis.vit.restart import BatchRestart


def layout_of(hidden_size: int) -> ViTLayout:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_labels=1000)
    return ViTLayout.of(ViTForImageClassification(config).eval())


@torch.no_grad()
def time_both(layout: ViTLayout, images: torch.Tensor) -> tuple[float, float]:
    """Seconds of leave-one-out by restarts, and by full passes."""
    grid = layout.grid_of(images)
    layout.run(images)
    restarts, full = 0.0, []

    def seconds(function) -> tuple[float, object]:
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result

    spent, batch = seconds(lambda: BatchRestart(layout, images, grid))
    restarts += spent
    layers = batch.layers()
    for index in range(layout.num_layers):
        spent, layer = seconds(lambda: next(layers))
        restarts += spent
        runs = []
        for head in range(layout.num_heads):
            runs.append(seconds(partial(layer.without, [head]))[0])
            if head % 4 == 0:
                with without_heads(layout, {index: [head]}):
                    full.append(seconds(lambda: layout.run(images))[0])
        restarts += layout.num_heads * statistics.median(runs)
    return restarts, layout.num_layers * layout.num_heads * statistics.median(full)


@torch.no_grad()
def memory(layout: ViTLayout, num_images: int, keep: bool) -> int:
    """Bytes that the process grows by."""
    images = torch.randn(num_images, 3, 224, 224)
    grid = layout.grid_of(images)

    def keep_all() -> None:
        layout.model.set_attn_implementation("eager")
        kept = [layout.model(pixels, output_attentions=True).attentions for pixels in images.split(4)]
        assert sum(len(maps[0]) for maps in kept) == num_images

    def reduce() -> None:
        sums, means = PruningSums(layout, grid, keep_one=False), MeanMaps(layout, grid)
        for pixels in images.split(4):
            means.add(pixels)
        sums.add(images[:4])
        assert means.maps.shape[0] == layout.num_layers

    return peak_memory(keep_all if keep else reduce)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384, help="hidden size (ViT-B/16: 768)")
    parser.add_argument("--batch_size", type=int, default=4, help="batch size for the timing")
    parser.add_argument("--images", type=int, default=64, help="batch size for the memory measurement")
    parser.add_argument("--only_memory", choices=["keep", "reduce"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    layout = layout_of(options.hidden_size)
    if options.only_memory:
        print(f'{{"bytes": {memory(layout, options.images, options.only_memory == "keep")}}}')
        return
    restarts, full = time_both(layout, torch.randn(options.batch_size, 3, 224, 224))
    shared = ("--hidden_size", options.hidden_size, "--images", options.images)
    kept, reduced = (run_fresh(__file__, *shared, "--only_memory", name)["bytes"] for name in ("keep", "reduce"))
    rows = [
        {"": "time (s)", "ours": restarts, "peer": full, "ratio": restarts / full, "mark": 0.48},
        {"": "memory (MB)", "ours": reduced / 1e6, "peer": kept / 1e6, "ratio": reduced / kept, "mark": 0.1},
    ]
    print_table(rows)
    write_json(options.json, {"hidden_size": options.hidden_size, "images": options.images, "rows": rows})


if __name__ == "__main__":
    main()
