"""CLEAR: masks, FLUX and SD3 transformers with local attention, and the losses of distillation."""

import copy
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from hf_attn.attention.clear import clear_mask
from hf_attn.patching.clear import apply_clear, clear_processors
from hf_attn.patching.clear.distillation import compared_attention, distillation_losses, freeze_for_distillation
from hf_attn.patching.clear.high_resolution import ntk_scaled
from tests.goldens.case import Case


BACKENDS = ("eager", "dense", "tiles", "flex")


@cache
def _process() -> ProcessPoolExecutor:
    """A process with the same float32 exponentials as those with which the cases were made.

    Their last bit depends on the instruction set that MKL chooses. diffusers multiplies the resulting frequencies by
    timesteps of thousands, and what comes out differs between CPUs by more than the tolerance of the cases. MKL reads the
    variable once, at its first call.
    """
    with mock.patch.dict(os.environ, MKL_CBWR="COMPATIBLE"):
        pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()
    return pool


def run(case: Case) -> dict[str, torch.Tensor]:
    results, used = _process().submit(_run, case).result()
    case.used |= used
    return results


def _run(case: Case) -> tuple[dict[str, torch.Tensor], set[str]]:
    results = _function_of(case)(case)
    return {name: tensor.detach() for name, tensor in results.items()}, case.used


def _function_of(case: Case):
    if case.entry.startswith("attention_processor.init_local"):
        return _masks
    if case.entry.startswith("distill.py"):
        return _distillation
    return _sd3 if "SD3" in case.entry else _flux


def _masks(case: Case) -> dict[str, torch.Tensor]:
    return {
        mask["name"]: clear_mask(
            mask["height"], mask["width"], mask["text_length"], mask["window_size"], mask["down_factor"]
        ).to(torch.uint8)
        for mask in case.config["masks"]
    }


def _patched(model_class, case: Case, backend: str):
    config = case.config
    model = model_class(**config["transformer"]).eval()
    apply_clear(model, config["window_size"], config["down_factor"], backend)
    model.load_state_dict(case.weights)
    assert len(clear_processors(model)) == len(model.attn_processors)
    return model


def _call(model, attentions: dict, **inputs) -> tuple[torch.Tensor, dict]:
    seen = {}
    handles = [
        module.register_forward_hook(lambda module, arguments, output, name=name: seen.update({name: output}))
        for name, module in attentions.items()
    ]
    with torch.no_grad():
        sample = model(**inputs, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return sample, seen


def _flux(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    height, width, text_length = config["height_tokens"], config["width_tokens"], config["text_length"]
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    inputs = {name: case.input(name) for name in names} | {"guidance": case.optional_input("guidance")}
    inputs["joint_attention_kwargs"] = {"proportional_attention": config.get("proportional_attention", False)}
    results = {}
    for backend in BACKENDS:
        model = _patched(FluxTransformer2DModel, case, backend)
        attentions = {
            "dual": model.transformer_blocks[0].attn,
            "single": model.single_transformer_blocks[0].attn,
        }
        with ntk_scaled(model, config.get("ntk_factor", 1)):
            sample, seen = _call(model, attentions, **inputs)
        dual_image, dual_text = seen["dual"]
        computed = {
            "sample": sample,
            "dual0_attn_image": dual_image,
            "dual0_attn_text": dual_text,
            "single0_attn": seen["single"],
        }
        for name, array in computed.items():
            results[f"{name}@{backend}"] = _as_stored(case, name, array)
    mask = clear_mask(height, width, text_length, config["window_size"], config["down_factor"]).to(torch.uint8)
    results["mask"] = mask
    results["mask_image_rows"] = mask[text_length:, text_length:]
    results["mask_text_row"] = mask[0]
    return {name: array for name, array in results.items() if name.partition("@")[0] in case.arrays}


def _as_stored(case: Case, name: str, array: torch.Tensor) -> torch.Tensor:
    """Long cases store the first tokens of the text, and the last ones before the image."""
    stored = case.arrays[name].shape[1] if name in case.arrays else array.shape[1]
    return array[:, :stored] if name == "dual0_attn_text" else array[:, array.shape[1] - stored :]


def _sd3(case: Case) -> dict[str, torch.Tensor]:
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    inputs = {name: case.input(name) for name in names}
    results = {}
    for backend in BACKENDS:
        model = _patched(SD3Transformer2DModel, case, backend)
        attentions = {
            f"block{i}_{name}": module
            for i, block in enumerate(model.transformer_blocks)
            for name in ("attn", "attn2")
            if (module := getattr(block, name)) is not None
        }
        sample, seen = _call(model, attentions, **inputs)
        results[f"sample@{backend}"] = sample
        for name, output in seen.items():
            if isinstance(output, tuple):
                results[f"{name}_image@{backend}"], results[f"{name}_text@{backend}"] = output
            else:
                results[f"{name}_image@{backend}"] = results[f"{name}@{backend}"] = output
    return {name: array for name, array in results.items() if name.partition("@")[0] in case.arrays}


def _distillation(case: Case) -> dict[str, torch.Tensor]:
    config = case.config
    teacher = FluxTransformer2DModel(**config["transformer"]).eval()
    teacher.load_state_dict(case.weights)
    student = copy.deepcopy(teacher)
    apply_clear(student, config["window_size"], config["down_factor"])
    trainable = freeze_for_distillation(student)
    assert len(trainable) == config["n_trainable_tensors"]
    assert sum(parameter.numel() for parameter in trainable.values()) == config["n_trainable_params"]
    assert compared_attention(student) == config["attention_loss_modules"]
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(case.input(f"student.{name}"))
    output = distillation_losses(
        student,
        teacher,
        latents=case.input("x0"),
        noise=case.input("noise"),
        sigmas=case.input("sigma"),
        encoder_hidden_states=case.input("encoder_hidden_states"),
        pooled_projections=case.input("pooled_projections"),
        guidance=config["guidance"],
    )
    return {
        "loss": output.loss.reshape(1),
        "loss_fm": output.flow_matching_loss.reshape(1),
        "loss_pred": output.prediction_loss.reshape(1),
        "loss_attn": output.attention_loss.reshape(1),
        "student_pred": output.student_prediction,
        "teacher_pred": output.teacher_prediction,
    }
