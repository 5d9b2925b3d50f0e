"""ViT analytics: metrics of given attention and logits, and a tiny ViT whose heads are pruned."""

import re

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_attn.analysis.vit.gating import partial_mask, without_attention, without_heads
from hf_attn.analysis.vit.hops import Grid, attention_strength, offset_map, patch_entropy, ring_mass, ring_mean
from hf_attn.analysis.vit.layout import ViTLayout
from hf_attn.analysis.vit.maps import attention_maps
from hf_attn.analysis.vit.metrics import prediction_change, representation_change
from hf_attn.analysis.vit.pruning import head_outcomes
from tests.goldens.case import Case


def run(case: Case) -> dict[str, torch.Tensor]:
    return _model(case) if case.weights else _functions(case)


def _strength(maps: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    mean = maps.mean(2)
    return {
        **vars(attention_strength(mean, grid)),
        "patch_entropy": patch_entropy(maps, grid).mean(-1),
        "offset_map": offset_map(mean, grid),
    }


def _expected(case: Case, results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: array for name, array in results.items() if name.partition("@")[0] in case.arrays}


def _importance(full_logits, pruned_logits, full_cls, pruned_cls, labels) -> dict[str, torch.Tensor]:
    changes = prediction_change(full_logits, pruned_logits, labels) | representation_change(full_cls, pruned_cls)
    return {f"importance.{name}": values.mean(-1) for name, values in changes.items()}


def _functions(case: Case) -> dict[str, torch.Tensor]:
    maps = case.input("attn")
    grid = Grid(*case.config["grid"], num_prefix_tokens=case.config["num_prefix_tokens"])
    names = ("full_logits", "pruned_logits", "full_cls", "pruned_cls")
    results = _importance(*(case.input(name) for name in names), case.optional_input("labels"))
    first = maps[0, 0, 0]
    return _expected(
        case,
        {
            **results,
            **_strength(maps, grid),
            "first_map_ring_mass": ring_mass(first, grid),
            # The reference writes -1 where a ring is empty.
            "first_map_ring_mean": ring_mean(first, grid).nan_to_num(-1.0),
            "first_map_ring_size": grid.ring_sizes(),
        },
    )


def _model(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    for implementation in ("eager", "sdpa"):
        model = ViTForImageClassification(ViTConfig(**case.config, attn_implementation=implementation)).eval()
        model.load_state_dict(case.weights)
        found = _analysed(case, model)
        results |= {f"{name}@{implementation}": array for name, array in found.items()}
    return _expected(case, results)


@torch.no_grad()
def _analysed(case: Case, model: ViTForImageClassification) -> dict[str, torch.Tensor]:
    layout = ViTLayout.of(model)
    images = case.input("pixel_values").float()
    grid = layout.grid_of(images)
    full, pruned = head_outcomes(layout, images)
    maps = attention_maps(layout, images)
    importance = _importance(
        full.logits, pruned.logits, full.representation, pruned.representation, case.optional_input("labels")
    )
    results = {
        "logits": full.logits,
        "cls": full.representation,
        "attn": maps,
        "pruned_logits": pruned.logits,
        "pruned_cls": pruned.representation,
        **importance,
        **_strength(maps, grid),
    }
    heads = range(layout.num_heads)
    for name in case.arrays:
        kind, _, part = name.partition(".")
        if kind == "partial":
            with without_attention(layout, *_partial_head(case), partial_mask(part, grid)):
                results[name] = layout.run(images).logits
        elif kind == "remove_layer":
            with without_heads(layout, {int(part): heads}):
                results[name] = layout.run(images).logits
        elif kind == "keep_one":
            layer, kept = _kept_head(part, layout.num_layers)
            with without_heads(layout, {layer: [head for head in heads if head != kept]}):
                results[name] = layout.run(images).logits
    return results


def _partial_head(case: Case) -> tuple[int, int]:
    said = next(text for name, text in case.info["outputs"].items() if name.startswith("partial"))
    layer, head = re.search(r"layer (\d+), head (\d+)", said).groups()
    return int(layer), int(head)


def _kept_head(name: str, num_layers: int) -> tuple[int, int]:
    layer, head = re.fullmatch(r"(?:last_)?layer(\d*)_head(\d+)", name).groups()
    return int(layer) if layer else num_layers - 1, int(head)
