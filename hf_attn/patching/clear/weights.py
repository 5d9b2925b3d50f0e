"""Trained CLEAR weights: the official files and our own.

A file holds the attention layers that the distillation trains, under the names of diffusers, and nothing else: the
official ones say only by their names, such as `clear_local_8_down_4.safetensors`, what they are for. Files saved here
say it in their metadata as well.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...attention.clear import renamed_backend
from ...catalog import PAPERS
from .patch import apply_clear, clear_processors, remove_clear


OFFICIAL_REPOSITORY = "Huage001/CLEAR"
WEIGHTS_NAME = "clear.safetensors"
_METADATA_KEY = "hf_attn_clear"


@dataclass(frozen=True)
class ClearWeightsReport:
    """What [`load_clear_weights`] did.

    Attributes:
        radius: of the disc, in tokens.
        down_factor: side of the pooled cells, 1 for none.
        loaded: names of the tensors, as in the file.
    """

    radius: int
    down_factor: int
    loaded: tuple[str, ...]


def load_clear_weights(
    transformer: nn.Module,
    weights: str | Path | Mapping[str, torch.Tensor],
    radius: int | None = None,
    down_factor: int | None = None,
    attn_implementation: str = "auto",
    backend: str | None = None,
) -> ClearWeightsReport:
    """Apply CLEAR to a transformer and load weights that were trained for it, in place.

    Works before and after LoRA adapters were added, where the weights of the base layers are loaded, and with fused
    projections, which are fused again.

    Args:
        transformer: `FluxTransformer2DModel`, `ChromaTransformer2DModel` or `SD3Transformer2DModel`, neither offloaded nor
            quantised.
        weights: a `.safetensors` file; a folder with `clear.safetensors`; a file of the Hub as
            `"owner/repository/file.safetensors"`, or one of the official `"clear_local_8"`, `"clear_local_16"`,
            `"clear_local_32"`, `"clear_local_8_down_4"`, `"clear_local_16_down_4"`; or the tensors by name.
        radius: of the disc, in tokens; read from the metadata or the name of the file by default.
        down_factor: side of the pooled cells; read likewise.
        attn_implementation: as of [`hf_attn.patching.clear.apply_clear`].
        backend: the old name of `attn_implementation`.

    Returns:
        Radius, down factor and the tensors that were loaded.

    Raises:
        ValueError: if radius or down factor can neither be read nor are given, or contradict the file; if a tensor is
            missing, left over or of another shape; if adapters are merged into the weights; or if the transformer is
            offloaded or quantised.
        FileNotFoundError: if there is no such file.
    """
    tensors, stored, source = _read(weights)
    radius = _setting("radius", radius, stored.get("radius"), source)
    cells = {tensor.shape[3] for name, tensor in tensors.items() if name.endswith("spatial_weight")}
    if len(cells) > 1:
        raise ValueError(f"{source} has spatial weights for several down factors: {sorted(cells)}.")
    in_tensors = cells.pop() if cells else 1
    if stored.get("down_factor", in_tensors) != in_tensors:
        raise ValueError(
            f"{source} has down factor {stored['down_factor']} according to its name or metadata, but its spatial "
            f"weights have down factor {in_tensors} (1 means none)."
        )
    down_factor = _setting("down_factor", down_factor, in_tensors, source)
    _refuse_merged(transformer)
    _refuse_out_of_reach(transformer)

    # Checked before anything is changed: a file that does not fit leaves the model as it was.
    targets = _targets(transformer)
    spatial = {f"{key}.spatial_weight" for key in transformer.attn_processors} if down_factor > 1 else set()
    expected = {name for name in targets if not name.endswith("spatial_weight")} | spatial
    missing, left_over = expected - tensors.keys(), tensors.keys() - expected
    if missing or left_over:
        raise ValueError(
            f"{source} does not fit this {type(transformer).__name__}: "
            + "; ".join(
                f"{what} {_first(names)}"
                for what, names in (("it lacks", missing), ("the model has no", left_over))
                if names
            )
            + "."
        )
    shape = (1, 1, 1, down_factor, 1, down_factor, 1)
    wrong = {
        name: (tuple(tensor.shape), wanted)
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != (wanted := shape if name in spatial else tuple(targets[name].shape))
    }
    if wrong:
        name, (found, wanted) = next(iter(wrong.items()))
        raise ValueError(f"{source} does not fit: {name} has shape {found} instead of {wanted} ({len(wrong)} such).")

    apply_clear(transformer, radius, down_factor, renamed_backend(attn_implementation, backend))
    targets = _targets(transformer)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    _fuse_again(transformer)
    return ClearWeightsReport(radius, down_factor, tuple(tensors))


@contextmanager
def clear_weights_loaded(transformer: nn.Module, weights, **arguments) -> Iterator[ClearWeightsReport]:
    """Context in which a transformer with full attention has CLEAR and its weights; both are removed at the end.

    The replaced weights wait on the CPU: 3.6 GB for FLUX.1 in bfloat16.

    Args:
        transformer: `FluxTransformer2DModel` or `SD3Transformer2DModel` without CLEAR.
        weights: as for [`load_clear_weights`], which also documents the errors.
        **arguments: its further arguments.
    """
    if clear_processors(transformer):
        raise ValueError("The transformer already has CLEAR attention. Call `remove_clear` first.")
    _refuse_out_of_reach(transformer)
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _targets(transformer).items()}
    try:
        yield load_clear_weights(transformer, weights, **arguments)
    finally:
        remove_clear(transformer)
        with torch.no_grad():
            for name, parameter in _targets(transformer).items():
                parameter.copy_(before[name])
        _fuse_again(transformer)


def save_clear_weights(
    transformer: nn.Module, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Save what CLEAR trains, with radius and down factor.

    Writes a model card as well, unless the folder has one. `save_pretrained` of diffusers saves neither radius nor down factor;
    `from_pretrained` then drops the spatial weights, and the model is one with full attention again.
    [`load_clear_weights`] reads the folder or the file.

    Args:
        transformer: with CLEAR on all its attention layers, all with the same settings.
        folder: made if it does not exist.
        state_dict: of the transformer, gathered, where its own parameters are shards of a distributed training.

    Returns:
        The file, `clear.safetensors` in the folder.

    Raises:
        ValueError: if some attention layers have full attention or other settings than others, or projections are fused
            or adapters are merged, so that the weights are not those that count; or if the transformer is offloaded or
            quantised.
    """
    processors = clear_processors(transformer)
    settings = {(processor.radius, processor.down_factor) for processor in processors.values()}
    if len(processors) < len(transformer.attn_processors) or len(settings) != 1:
        raise ValueError(
            f"{len(processors)} of {len(transformer.attn_processors)} attention layers have CLEAR attention, with "
            f"(radius, down_factor) in {sorted(settings)}. Only a model with the same settings in all layers can be "
            "saved."
        )
    if fused := _fused(transformer):
        raise ValueError(
            f"The projections of {_first(fused)} are fused, and the fused copy of the weights is in use. Call "
            "`transformer.unfuse_qkv_projections()` first, and fuse again afterwards."
        )
    _refuse_merged(transformer)
    radius, down_factor = settings.pop()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _targets(transformer)
    if state_dict is None:
        _refuse_out_of_reach(transformer)
    else:
        gathered = {name.replace(".base_layer.", "."): tensor for name, tensor in state_dict.items()}
        tensors = {name: gathered[name] for name in tensors}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps({"radius": radius, "down_factor": down_factor})}
    save_file(tensors, folder / WEIGHTS_NAME, metadata=metadata)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(_card(folder, transformer, tensors, radius, down_factor), encoding="utf-8")
    return folder / WEIGHTS_NAME


def _card(
    folder: Path, transformer: nn.Module, tensors: dict[str, torch.Tensor], radius: int, down_factor: int
) -> str:
    """The model card of saved weights."""
    paper = PAPERS["clear"]
    template = resources.files("hf_attn.model_cards").joinpath(f"{paper.slug}.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        name=folder.resolve().name,
        repo_id=folder,
        title=paper.title,
        arxiv=paper.arxiv,
        model_class=type(transformer).__name__,
        num_parameters=f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        radius=radius,
        down_factor=down_factor,
    )


def _targets(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the file -> parameter: in a layer with an adapter its base layer has it."""
    attentions = "|".join(re.escape(key.removesuffix(".processor")) for key in transformer.attn_processors)
    trained = re.compile(
        rf"(?:{attentions})\.(?:(?:to_q|to_k|to_v|to_out\.0)\.(?:weight|bias)|processor\.spatial_weight)"
    )
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in transformer.named_parameters()}
    return {name: parameter for name, parameter in parameters.items() if trained.fullmatch(name)}


def _fused(transformer: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in transformer.named_modules() if getattr(module, "fused_projections", False)
    }


def _fuse_again(transformer: nn.Module) -> None:
    """Copy changed weights into the fused weights of the layers."""
    for attn in _fused(transformer).values():
        if hasattr(attn, "unfuse_projections"):  # a fused layer of FLUX would not be fused again
            attn.unfuse_projections()
        attn.fuse_projections()


def _refuse_merged(transformer: nn.Module) -> None:
    for name, module in transformer.named_modules():
        if getattr(module, "merged", False):
            raise ValueError(
                f"An adapter is merged into {name}, so its weights are no longer those of the model. Unmerge it "
                "(`unfuse_lora()`) first."
            )


def _refuse_out_of_reach(transformer: nn.Module) -> None:
    """Raise where a tensor copied into a parameter would be lost, or would not be the weight."""
    for name, parameter in _targets(transformer).items():
        if parameter.is_meta or parameter.numel() == 0:
            raise ValueError(
                f"{name} is offloaded and not in memory. Load or save CLEAR's weights before offloading is enabled "
                "(`enable_sequential_cpu_offload()` and the like), or after `pipe.reset_device_map()` or `remove_all_hooks()`."
            )
        is_foreign = type(parameter).__module__.partition(".")[0] != "torch"
        if is_foreign or not parameter.is_floating_point() or parameter.itemsize == 1:
            raise ValueError(
                f"{name} is quantised ({type(parameter).__name__}, {parameter.dtype}). Load or save CLEAR's weights with the "
                "transformer in full or half precision, and quantise it afterwards."
            )


def _setting(name: str, given: int | None, found: int | None, source: str) -> int:
    if given is None and found is None:
        raise ValueError(f"{source} does not contain the {name} that it was trained with: pass `{name}=`.")
    if given is not None and found is not None and given != found:
        raise ValueError(f"{source} was trained with {name} = {found}, but {name} = {given} was passed.")
    return found if given is None else given


def _read(weights) -> tuple[dict[str, torch.Tensor], dict[str, int], str]:
    """Tensors, what is known of radius and down factor, and what to call the source in messages."""
    if isinstance(weights, Mapping):
        return dict(weights), {}, "The state dict"
    path = _find(weights)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    if _METADATA_KEY in metadata:
        return tensors, json.loads(metadata[_METADATA_KEY]), path.name
    match = re.fullmatch(r"clear_local_(\d+)(?:_down_(\d+))?", path.stem)
    if match is None:
        return tensors, {}, path.name
    return tensors, {"radius": int(match[1]), "down_factor": int(match[2] or 1)}, path.name


def _find(weights: str | Path) -> Path:
    path = Path(weights)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if path.is_file():
        return path
    name = str(weights)
    if re.fullmatch(r"clear_local_\d+(_down_\d+)?", name):
        return Path(hf_hub_download(OFFICIAL_REPOSITORY, f"{name}.safetensors"))
    if isinstance(weights, str) and re.fullmatch(r"[\w.-]+/[\w.-]+/[\w./-]+\.safetensors", name):
        owner, repository, file = name.split("/", 2)
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    raise FileNotFoundError(
        f"There are no CLEAR weights at {name!r}: it is not a file, a folder with {WEIGHTS_NAME}, a 'clear_local_...' "
        f"file of {OFFICIAL_REPOSITORY}, or 'owner/repository/file.safetensors' on the Hub."
    )


def _first(names, limit: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
