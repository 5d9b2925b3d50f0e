"""SD-RPN: the network's logits and gradients, boxes, and the two passes."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.sd_rpn.first_pass import run_first_pass, states_before
from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator
from hf_attn.modeling.sd_rpn.prompts import pad_to_square
from hf_attn.modeling.sd_rpn.regions import above_threshold, blur, padded_to_image, region_boxes
from tests.goldens.case import Case
from tests.goldens.tools import parameter_gradients, recorded

from .sd_rpn_labels import LABEL_ENTRIES


def run(case: Case) -> dict[str, torch.Tensor]:
    return next(function for entry, function in ENTRIES.items() if entry in case.entry)(case)


def _base_weights(case: Case, renames: dict[str, str]) -> dict[str, torch.Tensor]:
    """The base's weights of an official checkpoint under transformers' names."""
    weights = {}
    for name, tensor in case.weights.items():
        for official, new in renames.items():
            if re.match(official, name):
                weights[re.sub(official, new, name, count=1)] = tensor
                break
    return weights


def _llama_fields(config: dict) -> dict:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return {name: config[name] for name in names} | {"rope_parameters": rope}


def _queries(labels: torch.Tensor) -> torch.Tensor:
    """The token before the first label of each row."""
    return (labels != -100).int().argmax(dim=1) - 1


def _head_results(case: Case, rpn, inputs: dict, last_full: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and intermediates of a batch with labels."""
    with recorded({name: last_full}) as states:
        output = rpn(**inputs)
    output.loss.backward()
    trained = {name for name, parameter in rpn.named_parameters() if parameter.grad is not None}
    official = {re.sub(r"^(layers|norm)", r"model.twig_\1", name) for name in trained}
    if official != set(case.info["params_with_gradient"]):
        raise AssertionError(f"Other parameters have gradients: {official ^ set(case.info['params_with_gradient'])}")
    gradients = parameter_gradients(rpn)
    last = len(rpn.layers) - 1
    names = {
        "grad_last_k_proj": f"layers.{last}.self_attn.k_proj.weight",
        "grad_last_q_proj": f"layers.{last}.self_attn.q_proj.weight",
        "grad_twig0_q_proj": "layers.0.self_attn.q_proj.weight",
        "grad_twig_norm": "norm.weight",
    }
    valid = inputs["attention_mask"].bool()
    results = {name: gradients[own] for name, own in names.items() if name in case.arrays}
    return results | {
        "loss": output.loss[None],
        "backbone_hidden_valid": inputs["hidden_states"][valid],
        name: states[name][valid],
        "logits": output.logits,
    }


def _head_llava(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    rpn = from_official("sd_rpn", case.weights, config=config)
    base = LlamaForCausalLM(LlamaConfig(**_llama_fields(config))).eval()
    base.load_state_dict(_base_weights(case, {r"(model\.(layers|embed_tokens|norm)\.|lm_head\.)": r"\1"}))
    mask = case.input("attention_mask")
    with torch.no_grad():
        states, arguments = states_before(
            base.model.layers[config["twig_K"]],
            base,
            inputs_embeds=case.input("inputs_embeds"),
            attention_mask=mask,
            use_cache=False,
        )
    image_mask = torch.zeros_like(mask, dtype=torch.bool)
    image_mask[:, config["image_start"] : config["image_start"] + config["image_tokens"]] = True
    inputs = {
        "hidden_states": states,
        "position_embeddings": arguments["position_embeddings"],
        "attention_mask": mask,
        "image_mask": image_mask,
        "query_positions": _queries(case.input("labels")),
        "roi_target_map": case.input("roi_target_map"),
    }
    results = _head_results(case, rpn, inputs, rpn.norm, "twig_normed_valid")
    return results | {"roi_logits": results.pop("logits")}


def _head_qwen(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    rpn = from_official("sd_rpn", case.weights, config=config)
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    renames = {
        r"model\.twig_": "twig_",
        r"model\.": "model.language_model.",
        r"visual\.": "model.visual.",
        r"lm_head\.": "lm_head.",
    }
    weights = _base_weights(case, renames)
    base.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("twig_")})
    input_ids, mask = case.input("input_ids"), case.input("attention_mask")
    position_ids = []
    rotary = base.model.language_model.rotary_emb
    rotary.register_forward_pre_hook(lambda module, arguments: position_ids.append(arguments[1]))
    first_pass = run_first_pass(
        base,
        config["twig_K"],
        input_ids,
        attention_mask=mask,
        pixel_values=case.input("pixel_values"),
        image_grid_thw=case.input("image_grid_thw"),
        mm_token_type_ids=(input_ids == config["image_token_id"]).int(),
    )
    maps = [case.input(f"roi_target_map{row}") for row in range(len(input_ids))]
    inputs = first_pass.rpn_inputs() | {"query_positions": _queries(case.input("labels")), "roi_target_map": maps}
    results = _head_results(case, rpn, inputs, rpn.layers[-2], "twig_hidden_valid")
    logits = results.pop("logits")
    return results | {
        "roi_logits_flat": torch.cat([roi.flatten() for roi in first_pass.maps(logits)]),
        "position_ids_valid": position_ids[0][:, mask.bool()],
    }


def _boxes(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    grid = (case.config["grid"],) * 2
    for index, setting in enumerate(case.config["cases"]):
        blurred = blur(case.input(f"logits{index}").sigmoid())
        boxes = region_boxes(above_threshold(blurred, setting["conf_thresh"]))
        size = (setting["width"], setting["height"])
        pixels = [padded_to_image(box, grid, size, case.config["encoder_size"]) for box in boxes]
        results[f"blurred{index}"] = blurred
        results[f"boxes_grid{index}"] = torch.tensor(boxes, dtype=torch.long).view(-1, 4)
        results[f"boxes_image{index}"] = torch.tensor(pixels, dtype=torch.long).view(-1, 4)
    return results


def _two_stage(case: Case) -> dict[str, torch.Tensor]:
    config, vision = case.config, case.config["vision"]
    rpn = from_official("sd_rpn", case.weights, config=config)
    size = vision["image_size"]
    vision_names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision_names += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    cells = (size // vision["patch_size"]) ** 2
    image_token = config["vocab_size"] - 1
    base_config = LlavaConfig(
        text_config=LlamaConfig(**_llama_fields(config)),
        vision_config=CLIPVisionConfig(**{name: vision[name] for name in vision_names}),
        image_token_index=image_token,
        image_seq_length=cells,
        vision_feature_layer=vision["feature_layer"],
        vision_feature_select_strategy="default" if vision["drop_cls"] else "full",
    )
    base = LlavaForConditionalGeneration(base_config).eval()
    renames = {
        r"model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        r"model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
        r"(model)\.((layers|embed_tokens|norm)\.)": r"model.language_model.\2",
        r"lm_head\.": "lm_head.",
    }
    base.load_state_dict(_base_weights(case, renames))

    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    generator = SdRpnGenerator(base, rpn, SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer))
    image = Image.fromarray(case.input("image").numpy())
    mean = tuple(int(255 * channel) for channel in image_processor.image_mean)
    pixel_values = image_processor(images=pad_to_square(image, mean), return_tensors="pt")["pixel_values"]
    prompt = case.input("input_ids")[0].tolist()
    where = prompt.index(-200)
    input_ids = torch.tensor([prompt[:where] + [image_token] * cells + prompt[where + 1 :]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}
    # The official option without masks crops every box.
    masked = "upscale_method mask" in case.entry
    with recorded({"logits": rpn}) as outputs, recorded({"pixels": base.model.vision_tower}, inputs=True) as seen:
        focused = generator.focus(inputs, [[image]], config["roi_conf_thresh"], masked)
    found = focused.images[0][0]
    generated = base.generate(
        **focused.model_inputs,
        max_new_tokens=config["max_new_tokens"],
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    added = focused.model_inputs["input_ids"].shape[1] - input_ids.shape[1]
    if added != case.info["extra_tokens"]:
        raise AssertionError(f"The prompt grew by {added} tokens instead of {case.info['extra_tokens']}.")
    features = focused.model_inputs["mm_encoder_outputs"]["image"].pooler_output
    of_regions = {}
    if found.regions:
        of_regions = {
            "boxes_grid": torch.tensor([region.grid_box for region in found.regions]),
            "boxes_image": torch.tensor(found.boxes),
            "crop_pixel_values_corner": seen["pixels"][..., ::24, ::24],
            "sub_features_first_rows": torch.stack([crop[:4] for crop in features[1:]]),
        }
    return {
        "pixel_values_corner": pixel_values[..., ::24, ::24],
        "roi_logits": outputs["logits"].logits.view(found.roi_map.shape),
        "blurred": blur(found.roi_map),
        **of_regions,
        "first_logits": generated.logits[0][0],
        "all_logits": torch.cat(generated.logits),
        "generated_ids": generated.sequences[0, focused.model_inputs["input_ids"].shape[1] :],
    }


ENTRIES: dict[str, Callable[[Case], dict[str, torch.Tensor]]] = {
    "Qwen2_5_VLForConditionalGeneration.forward": _head_qwen,
    "LlavaLlamaForCausalLM.forward": _head_llava,
    "LlavaLlamaForCausalLM.generate": _two_stage,
    "get_bbox_from_noisy_map": _boxes,
    **LABEL_ENTRIES,
}
