"""Where the parts of a vision transformer are: its layers, their attention, the projections of the heads, the final norm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .hops import Grid


@dataclass(frozen=True)
class _Names:
    attention: str = "attention"
    projection: str = "o_proj"
    norm: str = "layernorm"
    #: whether a layer also works on its prefix tokens alone, once the outputs of its heads are known
    trims: bool = True
    #: whether the model resizes its position embeddings for images of another size by itself
    any_size: bool = False


#: class of the attention -> names of the parts
_KNOWN: Mapping[str, _Names] = {
    "ViTAttention": _Names(),
    "DeiTAttention": _Names(),
    "Dinov2Attention": _Names(any_size=True),
    "Dinov2WithRegistersAttention": _Names(any_size=True),
    "BeitAttention": _Names(trims=False),
    "CLIPAttention": _Names("self_attn", "out_proj", "post_layernorm"),
    "SiglipAttention": _Names("self_attn", "out_proj", "post_layernorm"),
    "SigmaReparamViTAttention": _Names(),
    # timm's vision_transformer
    "Attention": _Names("attn", "proj", "norm"),
}
SUPPORTED = (
    "ViT, DeiT, DINOv2 (also with registers), BEiT, the vision towers of CLIP and SigLIP, SigmaReparamViT, and the models of "
    "timm's vision_transformer"
)


class UnknownLayoutError(ValueError):
    """A model whose attention cannot be analysed; the message lists what is supported."""


@dataclass(frozen=True)
class Outcome:
    """Output of a model for images.

    Attributes:
        logits: `(images, classes)`; `None` of a model without a classifier.
        representation: `(images, width)`: the class token after the final norm, or the mean of the tokens where there is no
            class token.
    """

    logits: torch.Tensor | None
    representation: torch.Tensor


@dataclass
class ViTLayout:
    """The parts of a vision transformer; [`ViTLayout.of`] finds them.

    Attributes:
        model: the model.
        layers: its transformer layers.
        attentions: the attention of each layer.
        projections: the linear layer of each attention that mixes its heads.
        norm: the final norm.
        num_heads: heads of a layer; the same in all layers.
        patch_embedding: the convolution that makes patches.
        image_size: height and width of the images that the model takes; `None` of one that takes any.
        is_timm: whether it is a model of timm.
        trims: whether a layer also works on its prefix tokens alone, once the outputs of its heads are known.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    projections: Sequence[nn.Linear]
    norm: nn.Module
    num_heads: int
    patch_embedding: nn.Conv2d
    image_size: tuple[int, int] | None
    is_timm: bool
    trims: bool

    @classmethod
    def of(cls, model: nn.Module) -> "ViTLayout":
        """Find the parts of a model.

        Raises:
            UnknownLayoutError: for a model that is not supported.
        """
        is_timm = type(model).__module__.startswith("timm.")
        kind = type(model).__name__
        stacks = [
            (names, module)
            for module in model.modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            and len(module)
            and (names := _names_of(module, is_timm)) is not None
        ]
        if len(stacks) != 1:
            found = (
                "no stack of supported layers"
                if not stacks
                else f"{len(stacks)} stacks of layers, such as text and vision"
            )
            advice = " Pass the vision tower alone (`vision_model`)." if len(stacks) > 1 else ""
            raise UnknownLayoutError(f"{kind} has {found}.{advice} Supported: {SUPPORTED}.")
        names, layers = stacks[0]
        attentions = [getattr(layer, names.attention) for layer in layers]
        # Parts of layers have norms of the same name, deeper down.
        norms = [
            (name.count("."), module)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] == names.norm
        ]
        if not norms:
            raise UnknownLayoutError(f"{kind} has no final norm {names.norm!r}. Supported: {SUPPORTED}.")
        heads = {_num_heads(attention) for attention in attentions}
        if len(heads) != 1:
            raise UnknownLayoutError(f"The layers of {kind} have different numbers of heads, {sorted(heads)}.")
        return cls(
            model=model,
            layers=list(layers),
            attentions=attentions,
            projections=[getattr(attention, names.projection) for attention in attentions],
            norm=min(norms, key=lambda depth_and_norm: depth_and_norm[0])[1],
            num_heads=heads.pop(),
            patch_embedding=_first_convolution(model),
            image_size=None if names.any_size else _image_size(model, is_timm),
            is_timm=is_timm,
            trims=names.trims,
        )

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return tuple(self.patch_embedding.stride)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def grid_of(self, pixel_values: torch.Tensor) -> Grid:
        """The token embeddings of images.

        Raises:
            ValueError: for images of another size than the model's.
        """
        if pixel_values.dim() != 4 or not len(pixel_values):
            raise ValueError(f"Images must be (images, channels, height, width), got {tuple(pixel_values.shape)}.")
        size = tuple(pixel_values.shape[-2:])
        if self.image_size is None:
            if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
                raise ValueError(
                    f"Images are {size[0]} x {size[1]} pixels, which are not multiples of the patch size "
                    f"{self.patch_size}."
                )
        elif size != self.image_size:
            raise ValueError(
                f"Images are {size[0]} x {size[1]} pixels, but {type(self.model).__name__} takes {self.image_size[0]} "
                f"x {self.image_size[1]}. Prepare them with the model's image processor."
            )
        rows, cols = (side // patch for side, patch in zip(size, self.patch_size, strict=True))
        return Grid(rows, cols, self._num_tokens(pixel_values[:1]) - rows * cols)

    @torch.no_grad()
    def _num_tokens(self, pixel_values: torch.Tensor) -> int:
        counts = []
        hook = self.layers[0].register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
        try:
            self.forward(pixel_values)
        finally:
            hook.remove()
        return counts[0]

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """What the model returns."""
        return self.model(pixel_values) if self.is_timm else self.model(pixel_values=pixel_values)

    def run(self, pixel_values: torch.Tensor, has_class_token: bool = True) -> Outcome:
        """Logits and representation of images."""
        seen = []
        hook = self.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            output = self.forward(pixel_values)
        finally:
            hook.remove()
        states = seen[-1]
        if states.dim() == 3:
            states = states[:, 0] if has_class_token else states.mean(1)
        if self.is_timm:
            logits = output if getattr(self.model, "num_classes", 0) else None
        else:
            logits = getattr(output, "logits", None)
        return Outcome(logits=logits, representation=states)

    def check_heads(self, heads: Mapping[int, Sequence[int]]) -> None:
        """Raise `ValueError` for a layer or a head that the model does not have, or heads in another form."""
        if not isinstance(heads, Mapping) or any(isinstance(indices, int) for indices in heads.values()):
            raise ValueError(
                f"Heads must be a dictionary from layers to lists of heads, such as {{0: [1, 2]}}; got {heads!r}."
            )
        for layer, indices in heads.items():
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"Layer {layer} is out of range: the model has {self.num_layers} layers, counted from 0."
                )
            for head in indices:
                if not 0 <= head < self.num_heads:
                    raise ValueError(
                        f"Head {head} is out of range: a layer has {self.num_heads} heads, counted from 0."
                    )


def _names_of(stack: nn.Module, is_timm: bool) -> _Names | None:
    for kind, names in _KNOWN.items():
        attentions = [getattr(layer, names.attention, None) for layer in stack]
        if (
            all(type(attention).__name__ == kind for attention in attentions)
            and all(hasattr(attention, names.projection) for attention in attentions)
            and (kind != "Attention" or is_timm)
        ):
            return names
    return None


def _num_heads(attention: nn.Module) -> int:
    for name in ("num_attention_heads", "num_heads"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise UnknownLayoutError(
        f"{type(attention).__name__} does not define its number of heads. Supported: {SUPPORTED}."
    )


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise UnknownLayoutError(f"{type(model).__name__} has no patch embedding convolution. Supported: {SUPPORTED}.")


def _image_size(model: nn.Module, is_timm: bool) -> tuple[int, int] | None:
    if is_timm:
        size = model.patch_embed.img_size
        if not model.patch_embed.strict_img_size or size is None:
            return None
    else:
        config = model.config
        size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return (size, size) if isinstance(size, int) else tuple(size)


#: what a hook does with the weights of the heads, `(images, heads, tokens, tokens)`: new weights, or `None` to keep them
WeightsHook = Callable[[torch.Tensor], torch.Tensor | None]
