# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""SD-RPN's two passes against the plain answer of the base, at the proportions of LLaVA-1.5-7B.

32 layers, branch after 15, a network of 3, 576 image tokens and a prompt of about 60 others; the width is scaled down and the
weights are random, so that times are meaningful as ratios only. Measures the first pass (layers up to the branch, and the
network) as a fraction of a full prefill of the same prompt, and the whole answer, vision tower included, with and without a
region, against the plain answer.

    python scripts/benchmarks/sd_rpn.py --threads 1 --json sd_rpn.json
"""

import argparse
from pathlib import Path

import torch
from _common import alternating_medians, print_table, write_json
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_attn.modeling.sd_rpn.first_pass import run_first_pass
from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel, SdRpnOutput


#: the first pass may cost at most this fraction of a prefill
MARK = 0.6
LAYERS, BRANCH, RPN_LAYERS, GRID = 32, 15, 3, 24
QUESTION = "word " * 60


def make_processor() -> LlavaProcessor:
    vocabulary = {"<pad>": 0, "<image>": 1, "word": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<pad>", "<image>"])
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def make_base(width: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B with `width` instead of 4096, and everything else in proportion."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32000 * width // 4096,
        hidden_size=width,
        intermediate_size=11008 * width // 4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, width // 128),
        pad_token_id=0,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=width // 4,
        intermediate_size=width,
        num_hidden_layers=24,
        num_attention_heads=max(1, width // 256),
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=1, image_seq_length=GRID**2)
    return LlavaForConditionalGeneration(config).eval()


class PlacedRegion(SdRpnModel):
    """A network that does all of its work, and then answers with a map of the region that the measurement is about."""

    region: tuple[int, int, int, int] | None = None

    def forward(self, *arguments, **inputs) -> SdRpnOutput:
        logits = torch.full_like(super().forward(*arguments, **inputs).logits, -8.0)
        if self.region is not None:
            x0, y0, x1, y1 = self.region
            logits.view(-1, GRID, GRID)[:, y0:y1, x0:x1] = 8.0
        return SdRpnOutput(logits=logits)


@torch.no_grad()
def measure(options: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    base, processor = make_base(options.width), make_processor()
    rpn = PlacedRegion.from_base(base, branch_layer=BRANCH, num_hidden_layers=RPN_LAYERS)
    generator = SdRpnGenerator(base, rpn, processor)
    image = Image.effect_noise((640, 640), 64).convert("RGB")
    prompt = f"<image> {QUESTION}"
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    features = {"image": base.get_image_features(inputs["pixel_values"])}
    embedded = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "mm_encoder_outputs": features,
    }
    generate = {"max_new_tokens": options.new_tokens, "do_sample": False}

    def prefill() -> None:
        base(**embedded, use_cache=True, logits_to_keep=1)

    def first_pass() -> None:
        SdRpnModel.forward(rpn, **run_first_pass(base, BRANCH, **embedded).rpn_inputs())

    def plain() -> None:
        base.generate(**processor(text=[prompt], images=[image], return_tensors="pt"), **generate)

    def focused(region: tuple[int, int, int, int] | None) -> None:
        rpn.region = region
        generator.generate(prompt, image, **generate)

    seconds = alternating_medians(
        {
            "prefill": prefill,
            "first pass": first_pass,
            "plain answer": plain,
            "two passes, no region": lambda: focused(None),
            "two passes, one region": lambda: focused((6, 6, 14, 14)),
        },
        options.repeats,
    )
    against = dict.fromkeys(("prefill", "first pass"), "prefill")
    rows = [
        {
            "what": name,
            "seconds": value,
            "against": against.get(name, "plain answer"),
            "ratio": value / seconds[against.get(name, "plain answer")],
        }
        for name, value in seconds.items()
    ]
    ratios = {
        "first_pass_over_prefill": seconds["first pass"] / seconds["prefill"],
        "no_region_over_plain": seconds["two passes, no region"] / seconds["plain answer"],
        "one_region_over_plain": seconds["two passes, one region"] / seconds["plain answer"],
        "prompt_tokens": inputs["input_ids"].shape[1],
    }
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="hidden size of the decoder, a multiple of 256")
    parser.add_argument("--new_tokens", type=int, default=16, help="length of the answers in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows, ratios = measure(options)
    print(
        f"width {options.width}, {LAYERS} layers, branch after {BRANCH}, {RPN_LAYERS} layers of the network, "
        f"{ratios['prompt_tokens']} tokens, answers of {options.new_tokens}, {options.threads} thread(s)"
    )
    print_table(rows)
    ratio = ratios["first_pass_over_prefill"]
    print(f"\nfirst pass / prefill: {ratio:.3f} (mark: below {MARK}, {'met' if ratio < MARK else 'MISSED'})")
    settings = {name: getattr(options, name) for name in ("width", "new_tokens", "repeats", "threads")}
    write_json(options.json, {**settings, "mark": MARK, "rows": rows, **ratios})


if __name__ == "__main__":
    main()
