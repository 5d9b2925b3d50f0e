"""Checkpoints of the official SHViT code, and of timm, which renames its keys."""

import re

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_shvit import SHViTConfig
from .modeling_shvit import SHViTForImageClassification, SHViTModel


#: name of a folded convolution or linear layer -> its name before it was folded with its BatchNorm
_UNFOLDED = (
    (r"^(patch_embed\.\d+)\.", r"\1.c."),
    (r"^(blocks[23]\.[02]\.0|stages\.\d+\.downsample\.[03])\.(?:m\.)?", r"\1.m.c."),
    (r"\.conv\.(?:m\.)?(?=weight|bias)", ".conv.m.c."),
    (r"\.(qkv|proj\.1|pw[12]|conv[123])\.", r".\1.c."),
    (r"^(head|head_dist)\.", r"\1.l."),
)
#: official -> timm's
_TO_TIMM = (
    (r"^blocks1\.", "stages.0.blocks."),
    (r"^blocks([23])\.0\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
    (r"^blocks([23])\.1\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.2."),
    (r"^blocks([23])\.2\.(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.{int(match[2]) + 3}."),
    (r"^blocks([23])\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 3}."),
)
#: timm's -> ours, in [`SHViTForImageClassification`]
_TO_OURS = (
    (r"^head\.bn\.", "classifier.norm."),
    (r"^head\.l\.", "classifier.dense."),
    (r"^head_dist\.bn\.", "distillation_classifier.norm."),
    (r"^head_dist\.l\.", "distillation_classifier.dense."),
    (r"\.m\.", "."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"^patch_embed\.([0246])\.", lambda match: f"shvit.embeddings.layers.{int(match[1]) // 2}."),
    (r"^stages\.", "shvit.encoder.stages."),
    (r"\.downsample\.0\.", ".downsampling.local_mixing_before."),
    (r"\.downsample\.1\.", ".downsampling.mlp_before."),
    (r"\.downsample\.2\.", ".downsampling.patch_merging."),
    (r"\.downsample\.3\.", ".downsampling.local_mixing_after."),
    (r"\.downsample\.4\.", ".downsampling.mlp_after."),
    (r"\.blocks\.(\d+)\.conv\.", r".layers.\1.local_mixing."),
    (r"\.blocks\.(\d+)\.mixer\.", r".layers.\1.attention."),
    (r"\.blocks\.(\d+)\.ffn\.", r".layers.\1.mlp."),
    (r"\.pre_norm\.", ".norm."),
    (r"\.proj\.1\.", ".proj."),
    (r"\.pw([12])\.", r".fc\1."),
    (r"\.se\.", ".squeeze_excitation."),
)
OUR_NAMES, _FOLDED = Renaming(*_TO_TIMM, *_TO_OURS), Renaming(*_UNFOLDED, *_TO_TIMM, *_TO_OURS)


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert either layout; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: weights in either layout, also folded for inference (`fuse`), with a classifier, with two or with none.
        config: not needed, the weights say it all; if there are official constructor arguments (`embed_dim`, `depth`,
            `partial_dim`, `qk_dim`, `types`, `in_chans`, `num_classes`, `distillation`), they have to agree.
    """
    fused = "patch_embed.0.weight" in official
    state = (_FOLDED if fused else OUR_NAMES).state_dict(official)
    arguments = _read_arguments(state)
    variant = next(
        (
            fields
            for fields in SHViTConfig.variants.values()
            if fields["hidden_sizes"] == arguments["embed_dim"] and fields["depths"] == arguments["depth"]
        ),
        {},
    )
    # The width of an attention that a stage does not have cannot be read off, and changes nothing.
    known = (
        config.get("partial_dim") or variant.get("partial_dims") or [width // 4 for width in arguments["embed_dim"]]
    )
    arguments["partial_dim"] = [width or known[stage] for stage, width in enumerate(arguments["partial_dim"])]
    known = config.get("qk_dim") or SHViTConfig().qk_dims
    arguments["qk_dim"] = [width or known[stage] for stage, width in enumerate(arguments["qk_dim"])]

    for name, value in arguments.items():
        given = config.get(name, value)
        if (list(given) if isinstance(value, list) else given) != value:
            raise ConversionError(f"The weights are those of {name}={value}, but the configuration says {given}.")
    config.leave("source")  # timm's note of where its weights come from
    converted = SHViTConfig(
        image_size=variant.get("image_size", 224),
        num_channels=arguments["in_chans"],
        **published_labels(arguments["num_classes"]),
        hidden_sizes=arguments["embed_dim"],
        depths=arguments["depth"],
        partial_dims=arguments["partial_dim"],
        qk_dims=arguments["qk_dim"],
        block_types=arguments["types"],
        distillation=arguments["distillation"],
        fused=fused,
    )
    if arguments["num_classes"]:
        return Converted(SHViTForImageClassification, converted, state)
    return Converted(SHViTModel, converted, {name.removeprefix("shvit."): tensor for name, tensor in state.items()})


def _read_arguments(state: dict) -> dict:
    """Official constructor arguments, read off our names and the shapes; a width is 0 where there is no attention."""
    arguments = {"embed_dim": [], "depth": [], "types": [], "partial_dim": [], "qk_dim": []}
    blocks = [re.match(r"shvit\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", name) for name in state]
    for stage in sorted({int(block[1]) for block in blocks if block}):
        first = f"shvit.encoder.stages.{stage}.layers.0."
        qkv = state.get(first + "attention.qkv.conv.weight")
        partial_dim = qkv.shape[1] if qkv is not None else 0
        arguments["depth"].append(1 + max(int(block[2]) for block in blocks if block and int(block[1]) == stage))
        arguments["embed_dim"].append(_get(state, first + "mlp.fc1.conv.weight").shape[1])
        arguments["types"].append("i" if qkv is None else "s")
        arguments["partial_dim"].append(partial_dim)
        arguments["qk_dim"].append((qkv.shape[0] - partial_dim) // 2 if qkv is not None else 0)
    arguments["in_chans"] = _get(state, "shvit.embeddings.layers.0.conv.weight").shape[1]
    classifier = state.get("classifier.dense.weight")
    arguments["num_classes"] = 0 if classifier is None else classifier.shape[0]
    arguments["distillation"] = "distillation_classifier.dense.weight" in state
    return arguments


def _get(state: dict, name: str):
    if name not in state:
        raise ConversionError(f"This is not an SHViT checkpoint: no tensor corresponds to {name}.")
    return state[name]
