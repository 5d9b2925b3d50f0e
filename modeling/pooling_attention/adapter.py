"""Files of the official training: a PEFT adapter of the decoder, and the head in `attn_pool.pt`."""

from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_attn.checkpoints.files import ConversionError, read_checkpoint
from hf_attn.checkpoints.official import from_official

from .modeling_pooling_attention import PoolingAttentionModel


HEAD_FILE = "attn_pool.pt"


def load_official_adapter(
    folder: str | Path,
    design: int,
    base: PreTrainedModel | str | Path | None = None,
    num_cross_heads: int | None = None,
    **overrides,
) -> PoolingAttentionModel:
    """Make an embedder from a folder of the official training; the adapter is merged into the decoder.

    Args:
        folder: the PEFT adapter. The head is `attn_pool.pt` in it or, as the official trainer writes it, `<folder>attn_pool.pt`
            beside it. Design 1 has none.
        design: 1 to 5, which the folder does not say.
        base: the decoder, or its Hub id; the one that the adapter names if not given. An object is changed.
        num_cross_heads: attention heads of the head, 32 if not given.
        overrides: fields of the configuration.

    Raises:
        ConversionError: if a file is missing, or the adapter or the head does not fit.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    folder = Path(folder)
    head = None
    if design > 1:
        beside = folder.with_name(f"{folder.name}{HEAD_FILE}")
        file = next((path for path in (folder / HEAD_FILE, beside) if path.is_file()), None)
        if file is None:
            raise ConversionError(
                f"Design {design} has a head, but there is neither {folder / HEAD_FILE} nor {beside}."
            )
        head = from_official(
            "pooling_attention", file, {} if num_cross_heads is None else {"num_cross_heads": num_cross_heads}
        )
        if (head.layer_embeddings is not None) != (design in (3, 5)):
            kind = "a last-layer head" if head.layer_embeddings is None else "a multi-layer head"
            raise ConversionError(f"{file.name} is {kind}, but design {design} needs the other kind.")
        overrides |= {
            "num_latents": len(head.latents),
            "num_pooling_heads": head.attention.num_heads,
            "pooling_head_dim": head.attention.head_dim,
        }
    file = next(
        (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()),
        None,
    )
    if file is None:
        raise ConversionError(f"{folder} contains no PEFT adapter (adapter_model.safetensors).")
    names = set(read_checkpoint(file))
    if not isinstance(base, PreTrainedModel):
        base = base or PeftConfig.from_pretrained(folder).base_model_name_or_path
        has_head = any(name.startswith("base_model.model.model.") for name in names)
        base = (AutoModelForCausalLM if has_head else AutoModel).from_pretrained(base, dtype="auto")
    adapted = PeftModel.from_pretrained(base, folder)
    different = names ^ set(get_peft_model_state_dict(adapted))
    if different:
        raise ConversionError(f"The adapter does not fit {type(base).__name__}: {', '.join(sorted(different)[:6])}.")
    model = PoolingAttentionModel.from_base(adapted.merge_and_unload(), design=design, **overrides)
    if head is not None:
        model.head.load_state_dict(head.state_dict())
    return model
