"""SD-RPN: attention maps of a base model, and labels made of them."""

import torch

from hf_attn.modeling.sd_rpn.labels.answer_attention import average_attention
from hf_attn.modeling.sd_rpn.labels.rule import llava_pseudo_labels, qwen_pseudo_labels
from tests.goldens.case import Case


#: official argument -> ours
_ARGUMENTS = {
    "sink_thresh": "sink_threshold",
    "binary_coff": "foreground_ratio",
    "bg_coff": "background_ratio",
    "max_ratio_limit": "max_box_ratio",
    "min_peak": "min_peak",
}


def _thresholds(case: Case) -> dict[str, float]:
    return {ours: case.config[official] for official, ours in _ARGUMENTS.items() if official in case.config}


def _llava(case: Case) -> dict[str, torch.Tensor]:
    side = case.config["grid"]
    grounding, sink = (case.input(name).view(-1, side, side) for name in ("grounding", "sink"))
    labels, boxes = llava_pseudo_labels(grounding, sink, **_thresholds(case))
    return {"labels": labels.flatten(1), "fg_bbox": boxes}


def _qwen(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for i, image in enumerate(case.config["cases"]):
        maps = (case.input(f"{name}{i}")[None] for name in ("grounding", "sink"))
        labels, boxes = qwen_pseudo_labels(*maps, [(image["width"], image["height"])], **_thresholds(case))
        results |= {f"labels{i}": labels[0], f"fg_bbox{i}": boxes[0]}
    return results


def _attention_rows(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    image = slice(config["system_tokens"], config["system_tokens"] + config["image_tokens"])
    heads = config["grounding_heads"]

    def rows(layer: int, steps: list[int]) -> torch.Tensor:
        return torch.cat([case.input(f"layer{layer}.step{step}")[..., image] for step in steps], 2)

    grounding, sink = config["grounding_layer"], config["sink_layer"]
    # The prefill of the sink layer is not used.
    case.input(f"layer{sink}.step0")
    steps = list(range(1, config["decode_steps"] + 1))
    return {
        "grounding_unmasked": average_attention([rows(grounding, steps)[:, heads]])[0],
        "sink": average_attention([rows(sink, steps)])[0],
        "question_map": average_attention([rows(grounding, [0])[:, heads]])[0],
    }


LABEL_ENTRIES = {
    "llava.mm_utils.create_pseudo_labels": _llava,
    "qwen_src.mm_utils.create_pseudo_labels": _qwen,
    "llava.ana_utils.get_attn_weights_map": _attention_rows,
}
