"""`apply_fast_attention` and its undoing."""

from torch import nn

from hf_attn.attention.disentangled import DISENTANGLED, PACKAGES
from hf_attn.kernels.disentangled.packages import is_installed

from .attention import FAST_ATTENTION, FAST_ENCODERS, NO_TOKENS, FastEncoder, FastSelfAttention


_PLAIN = {fast: plain for plain, fast in (FAST_ENCODERS | FAST_ATTENTION).items()}
_TERMS = ("c2p", "p2c")


def check_implementation(implementation: str) -> None:
    """Raise a ValueError if there is no such implementation, or its package is missing."""
    if implementation not in DISENTANGLED.names:
        raise ValueError(f"implementation must be one of {', '.join(DISENTANGLED.names)}, got {implementation!r}.")
    if implementation in PACKAGES and not is_installed(implementation):
        raise ValueError(
            f"implementation={implementation!r} needs the package {implementation.replace('_', '-')}, which is not installed. "
            "Install it with `pip install 'hf_attn[deberta-cuda]'`, or use implementation='auto'."
        )


def make_encoder_fast(encoder: nn.Module, implementation: str, hf_compat: bool) -> list[FastSelfAttention]:
    """Turn the attention modules of one encoder of transformers into fast ones; see [`apply_fast_attention`]."""
    found = []
    for name, module in encoder.named_modules():
        if type(module).__name__.endswith("SelfAttention"):
            if type(module) not in FAST_ATTENTION:
                raise ValueError(f"{name} is a {type(module).__name__}, which is not transformers' own attention.")
            unknown = [term for term in module.pos_att_type if term not in _TERMS]
            if unknown:
                raise ValueError(
                    f"pos_att_type {', '.join(unknown)} is not supported. Available: {', '.join(_TERMS)}."
                )
            if getattr(module, "talking_head", False):
                raise ValueError(
                    "talking_head is not supported: it mixes the scores of all heads, which the fast attention never "
                    "computes at once."
                )
            found.append(module)
    for module in found:
        module.__class__ = FAST_ATTENTION[type(module)]
        module.implementation = implementation
        module.make_fast(hf_compat)
    return found


def apply_fast_attention(model: nn.Module, implementation: str = "auto", hf_compat: bool = False) -> tuple[str, ...]:
    """Make the attention of a DeBERTa fast, in place.

    Parameters and their names stay, so a saved model is an ordinary DeBERTa. The outputs of real tokens are those of
    transformers, for forward and backward; rows of padding are a matter of convention and differ.

    Args:
        model: any model of transformers with a DeBERTa (v1, v2 or v3) inside; wrappers such as PEFT's are looked through.
        implementation: `"auto"` picks by device and call. `"eager"` is the specification, `"torch"` works everywhere,
            `"flex"` is FlexAttention; `"disentangled_flash"` and `"flashdeberta"` are CUDA kernels of the packages of these
            names. A named implementation that does not support a call raises. Calls with `output_attentions=True`
            are always computed by `"eager"`.
        hf_compat: treat distances of `max_relative_positions` tokens and more as transformers does, which forgets the
            clamp of the official code and reads a row that was never trained. Makes no difference to shorter texts.

    Returns:
        Names of the attention modules that are fast now.

    Raises:
        ValueError: if the model holds no DeBERTa, has a fast attention already, or uses an option that is not supported;
            if there is no such implementation or its package is missing.
    """
    check_implementation(implementation)
    modules = dict(model.named_modules())
    if any(isinstance(module, FastSelfAttention) for module in modules.values()):
        raise ValueError(
            f"{type(model).__name__} already has fast attention. Call remove_fast_attention first to choose another "
            "implementation."
        )
    encoders = [module for module in modules.values() if type(module) in FAST_ENCODERS]
    if not encoders:
        raise ValueError(
            f"{type(model).__name__} is not a DeBERTa model: it has no DebertaEncoder or DebertaV2Encoder of "
            "transformers."
        )
    fast = []
    for encoder in encoders:
        fast += make_encoder_fast(encoder, implementation, hf_compat)
        encoder.__class__ = FAST_ENCODERS[type(encoder)]
    for module in modules.values():
        # Wrappers pass on what they do not have.
        if module._modules.get("encoder") in encoders:
            module._fast_attention_handle = module.register_forward_pre_hook(_refuse_empty_texts, with_kwargs=True)
    return tuple(name for name, module in modules.items() if any(module is attention for attention in fast))


def _refuse_empty_texts(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a model without a head: transformers looks at the first and the last token."""
    for given in (args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if given is not None and given.shape[1:2] == (0,):
            raise ValueError(NO_TOKENS)


def remove_fast_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo [`apply_fast_attention`], in place.

    Returns:
        Names of the attention modules that are transformers' own again.

    Raises:
        ValueError: if the model has no fast attention to remove.
    """
    modules = dict(model.named_modules())
    fast = [name for name, module in modules.items() if isinstance(module, FastSelfAttention)]
    removable = [module for module in modules.values() if type(module) in _PLAIN]
    if not any(isinstance(module, FastEncoder) for module in removable):
        raise ValueError(f"{type(model).__name__} has no fast attention to remove.")
    for module in modules.values():
        if "_fast_attention_handle" in module.__dict__:
            module.__dict__.pop("_fast_attention_handle").remove()
    for module in removable:
        if isinstance(module, FastSelfAttention):
            module.make_plain()
        module.__class__ = _PLAIN[type(module)]
    return tuple(fast)
