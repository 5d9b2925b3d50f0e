# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Official checkpoints of landmark attention: LLaMA with landmarks, and the GPT of `lm_benchmark`.

LLaMA's weights are published as their difference to those of LLaMA-7B, from which they are recovered.

LLaMA's has transformers' own key names. The GPT has fused projections, and interleaves the pairs of the rotary embedding,
(2i, 2i + 1), which transformers pairs as halves, (i, i + d/2): the rows of its query and key projections are reordered, which
does not change the scores.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_attn.architectures.rotary import half_split
from hf_attn.checkpoints.files import read_checkpoint
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict, select_state_dict
from hf_attn.checkpoints.renaming import KEEP, Renaming, split_fused

from .configuration_landmark import LandmarkConfig
from .modeling_landmark import LandmarkForCausalLM


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert either of the official layouts; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: official weights.
        config: LLaMA's `config.json`: `mem_id`, `mem_freq`, `train_context_length`, `include_landmark_in_loss` and the
            fields of a Llama. If the weights are a difference, `difference_to` is the file or folder of the raw LLaMA, and
            `checksum`, optionally, the sum of all recovered entries. GPT's arguments: `n_embd`, `n_head`, `n_layer`, `vocab_size`, `sequence_length`,
            `landmark_id`, `mem_cache_freq`.
    """
    if "transformer.wte.weight" in official:
        return _convert_gpt(official, config)
    if "model.embed_tokens.weight" in official:
        return _convert_llama(official, config)
    raise ConversionError(
        "This is not an official layout of landmark attention: neither LLaMA's (model.embed_tokens.weight) nor the "
        "GPT's (transformer.wte.weight)."
    )


#: transformers' names, with the tables of its old versions
_LLAMA = Renaming((r"\.rotary_emb\.inv_freq$", None), KEEP)
#: tables and the head, which is the embeddings, are dropped
_GPT = Renaming(
    (r"^(transformer\.wpe\.freqs|lm_head\.weight)$|\.attn\.bias$", None),
    (r"^transformer\.wte\.", "model.embed_tokens."),
    (r"^transformer\.ln_f\.", "model.norm."),
    (r"^transformer\.h\.", "model.layers."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.attn\.c_attn\.", ".self_attn.qkv."),
    (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)


def _convert_llama(official: StateDict, arguments: dict) -> Converted:
    if "difference_to" in arguments:
        official = recover_from_difference(_read_raw(arguments["difference_to"]), official, arguments)
    fields = LandmarkConfig.__dataclass_fields__
    values = {
        name: value for name, value in arguments.items() if name in fields and name not in ("model_type", "dtype")
    }
    values.pop("architectures", None)
    values["landmark_token_id"] = arguments["mem_id"]
    arguments.leave_rest()  # a `config.json` names much besides
    if "rope_theta" in arguments:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": float(arguments["rope_theta"])}
    state = _LLAMA.state_dict(official)
    values.setdefault("tie_word_embeddings", "lm_head.weight" not in state)
    return Converted(LandmarkForCausalLM, LandmarkConfig(**values), state, _LLAMA.dropped(official))


#: sum of the entries of the published 7B model, with the tables of the rotary embedding
LLAMA_7B_CHECKSUM = 49798.7656


def _read_raw(source: str | Path) -> dict[str, torch.Tensor]:
    source = Path(source)
    if source.is_dir():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    return select_state_dict(read_checkpoint(source), source.name)


def recover_from_difference(
    raw: Mapping[str, torch.Tensor], difference: Mapping[str, torch.Tensor], arguments: Mapping
) -> StateDict:
    """Add the published difference to the raw LLaMA, whose vocabulary grows by rows that are the means of the others.

    Args:
        raw: weights of the raw model.
        difference: the published weights.
        arguments: the official configuration: `hidden_size`, `num_attention_heads`, `num_hidden_layers`, and, if it is not
            the published 7B model, `checksum`.

    Returns:
        The recovered weights in float32.

    Raises:
        ConversionError: if the keys or shapes do not fit, or if the sum of all entries is not the checksum.
    """
    difference = {name: difference[name] for name in difference}
    tables = {name for name in {*raw, *difference} if name.endswith(".rotary_emb.inv_freq")}
    missing, unknown = (set(difference) - set(raw)) - tables, (set(raw) - set(difference)) - tables
    if missing or unknown:
        raise ConversionError(
            f"The raw model does not match this difference. Missing tensors: {', '.join(sorted(missing)) or 'none'}; "
            f"unexpected tensors: {', '.join(sorted(unknown)) or 'none'}."
        )
    recovered = {}
    for name in sorted(set(difference) - tables):
        old, change = raw[name].float(), difference[name].float()
        if name in ("model.embed_tokens.weight", "lm_head.weight") and len(old) < len(change):
            old = torch.cat([old, old.mean(0, keepdim=True).expand(len(change) - len(old), -1)])
        if old.shape != change.shape:
            raise ConversionError(
                f"The raw model does not match this difference: {name} is {list(old.shape)} instead of "
                f"{list(change.shape)}."
            )
        recovered[name] = old + change

    checksum = arguments.get("checksum")
    if checksum is None and (arguments["hidden_size"], arguments["num_hidden_layers"]) == (4096, 32):
        checksum = LLAMA_7B_CHECKSUM
    if checksum is not None:
        head_dim = arguments["hidden_size"] // arguments["num_attention_heads"]
        # The sum was taken over the tables of the rotary embedding as well, which models do not store any more.
        table = (1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)).sum() * arguments["num_hidden_layers"]
        total = float(sum(tensor.sum() for tensor in recovered.values()) + table)
        if abs(total - checksum) > 0.01:
            raise ConversionError(
                f"The recovered weights sum to {total:.4f} instead of {checksum:.4f}: this is not the right raw "
                "model, or a file is damaged."
            )
    return StateDict(recovered)


def _convert_gpt(official: StateDict, arguments: dict) -> Converted:
    width, heads, layers = arguments["n_embd"], arguments["n_head"], arguments["n_layer"]
    mem_freq = arguments["mem_cache_freq"]
    arguments.leave_rest()  # the other arguments belong to the cache and to training
    embedding = official["transformer.wte.weight"]
    config = LandmarkConfig(
        vocab_size=len(embedding),
        landmark_token_id=arguments["landmark_id"],
        mem_freq=mem_freq,
        train_context_length=arguments["sequence_length"],
        include_landmark_in_loss=False,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=arguments["sequence_length"],
        norm_type="layer_norm",
        rms_norm_eps=1e-5,
        gated_mlp=False,
        hidden_act="gelu",
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = split_fused(_GPT.state_dict(official), "qkv")
    state = {
        name: half_split(tensor, config.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else tensor
        for name, tensor in state.items()
    }
    state["lm_head.weight"] = embedding
    return Converted(LandmarkForCausalLM, config, state, _GPT.dropped(official))
