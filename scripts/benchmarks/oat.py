# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""OAT: sampling scanpaths of one scene, against the same network that encodes the scene again in every step.

`generate` encodes the images of the objects and the scene once for all steps and samples, keeps one row of keys and values of the
cross-attention for all samples, and caches the decoder. The peers compute the same with the same weights:

- `together`: all samples in one batch; in every step the scene is encoded, its encoding repeated for each sample, and the whole
  prefix decoded;
- `one by one`: the official way, a batch of one scanpath, images of objects and prefix included; one scanpath is timed, and its time
  multiplied by the number of samples.

`encoding` is the time of one pass of the encoder. Times are the least of several, measured in turns.

    OMP_NUM_THREADS=1 python scripts/benchmarks/oat.py --json oat.json
"""

import argparse
from pathlib import Path

import torch
from _common import alternating_times, print_table, write_json

from hf_attn.modeling.oat.configuration_oat import OATConfig
from hf_attn.modeling.oat.modeling_oat import OATEncoderOutput, OATForScanpathPrediction


def step(logits: torch.Tensor, num_objects: int) -> torch.Tensor:
    """Draw the next object; neither EOS nor PAD, so that all scanpaths have one length."""
    return logits[:, -1, :num_objects].softmax(-1).multinomial(1)


@torch.no_grad()
def sample_together(model: OATForScanpathPrediction, scene: dict, num_samples: int, steps: int) -> torch.Tensor:
    num_objects = scene["pixel_values"].shape[1]
    ids = torch.full((num_samples, 1), num_objects + 2)
    for _ in range(steps):
        encoded = model.oat.encoder(**scene)
        repeated = OATEncoderOutput(
            last_hidden_state=encoded.last_hidden_state.repeat_interleave(num_samples, dim=0),
            token_embeddings=encoded.token_embeddings.repeat_interleave(num_samples, dim=0),
        )
        logits = model(encoder_outputs=repeated, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, step(logits, num_objects)], dim=1)
    return ids


@torch.no_grad()
def sample_one(model: OATForScanpathPrediction, scene: dict, steps: int) -> torch.Tensor:
    num_objects = scene["pixel_values"].shape[1]
    ids = torch.full((1, 1), num_objects + 2)
    for _ in range(steps):
        ids = torch.cat([ids, step(model(**scene, decoder_input_ids=ids, use_cache=False).logits, num_objects)], dim=1)
    return ids


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="amazon", choices=list(OATConfig.variants))
    parser.add_argument("--num_samples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = OATConfig.from_variant(options.variant)
    model = OATForScanpathPrediction(config).eval()
    size = (config.num_channels, config.crop_height, config.crop_width)
    scene = {"pixel_values": torch.rand(1, config.num_objects, *size), "target_index": torch.tensor([5])}
    length = {"max_new_tokens": options.steps, "min_new_tokens": options.steps}

    def generate() -> torch.Tensor:
        return model.generate(**scene, **length, do_sample=True, num_return_sequences=options.num_samples)

    @torch.no_grad()
    def encode() -> torch.Tensor:
        return model.oat.encoder(**scene).last_hidden_state

    callables = {
        "generate": generate,
        "encoding": encode,
        "together": lambda: sample_together(model, scene, options.num_samples, options.steps),
        "one scanpath": lambda: sample_one(model, scene, options.steps),
    }
    seconds = {name: min(times) for name, times in alternating_times(callables, options.repeats).items()}
    one_by_one = options.num_samples * seconds["one scanpath"]
    row = {
        "objects": config.num_objects,
        "samples": options.num_samples,
        "steps": options.steps,
        "generate s": seconds["generate"],
        "encoding s": seconds["encoding"],
        "generate / encoding": seconds["generate"] / seconds["encoding"],
        "x together": seconds["together"] / seconds["generate"],
        "x one by one": one_by_one / seconds["generate"],
    }
    print_table([row])
    write_json(options.json, {"threads": options.threads, "repeats": options.repeats, **row})


if __name__ == "__main__":
    main()
