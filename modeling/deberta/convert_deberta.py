"""Checkpoints of the official code, and of the Hub, in the layouts of DeBERTa v1 and of v2 and v3."""

import re

import torch
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import KEEP, Renaming

from .configuration_deberta import DebertaEMDConfig
from .modeling_deberta import DebertaEMDForMaskedLM


_POSITIONS = "deberta.embeddings.position_embeddings.weight"
#: official arguments that the configurations of transformers have under the same name
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "relative_attention",
    "max_relative_positions",
    "position_biased_input",
    "pos_att_type",
)
#: those that only v2 and v3 have, with what their absence means
_V2_ONLY = {
    "position_buckets": -1,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "conv_kernel_size": 0,
    "conv_act": "tanh",
    "conv_groups": 1,
    "embedding_size": None,
}
#: arguments of heads, training and bookkeeping, which a configuration may have for any of the models
_OTHER = (
    "_name_or_path",
    "architectures",
    "cls_dropout",
    "drop_out",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "legacy",
    "model_type",
    "num_labels",
    "pooler_dropout",
    "pooler_hidden_act",
    "pooler_hidden_size",
    "pooling",
    "torch_dtype",
    "transformers_version",
    "vat_init_perturbation",
    "vat_lambda",
    "vat_learning_rate",
    "vat_loss_fn",
)


#: v1 -> v2
_V1_NAMES = Renaming(
    (r"\.self\.q_bias$", ".self.query_proj.bias"),
    (r"\.self\.v_bias$", ".self.value_proj.bias"),
    (r"\.self\.pos_proj\.", ".self.pos_key_proj."),
    (r"\.self\.pos_q_proj\.", ".self.pos_query_proj."),
    KEEP,
)


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.from_official`].

    Args:
        official: weights of `MaskedLanguageModel` or `SequenceClassificationModel`. A masked language model becomes a
            [`DebertaEMDForMaskedLM`], a classifier a model of transformers.
        config: official arguments, or `config.json` of the Hub.
    """
    if any(name.startswith("mask_predictions.") for name in official):
        raise ConversionError(
            "This is a discriminator of DeBERTa v3 (mask_predictions), which was trained to detect replaced tokens "
            "and cannot fill masks. The masked language model is in the file `pytorch_model.generator.bin` of the "
            "same repository."
        )
    fused = any(name.endswith("self.in_proj.weight") for name in official)
    arguments = _arguments(official, config)
    if "classifier.weight" in official:
        return _convert_classifier(official, config, arguments, fused)
    if not any(name.startswith("lm_predictions.") for name in official):
        raise ConversionError(
            "The checkpoint has no mask decoder (lm_predictions.*) and no classifier. To use the encoder alone, load it with "
            "transformers' AutoModel; of DeBERTa v3 the file `pytorch_model.generator.bin` has a mask decoder."
        )
    if _POSITIONS not in official:
        raise ConversionError(
            f"The checkpoint has no {_POSITIONS}, which the mask decoder adds. transformers drops it when saving a "
            "model: convert the original file."
        )
    if fused:
        state = _split_projections(official, arguments["num_attention_heads"])
    else:
        state = {name: official[name] for name in official}
    return Converted(DebertaEMDForMaskedLM, DebertaEMDConfig(**arguments), state)


def _arguments(official: StateDict, config: OfficialArguments) -> dict:
    config.leave(*_OTHER, "num_hidden_layers")
    arguments = {name: config[name] for name in _SAME if name in config}
    arguments |= {name: config.get(name, default) for name, default in _V2_ONLY.items()}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config.get("attention_head_size", width // heads) * heads != width:
        raise ConversionError(
            f"attention_head_size {config['attention_head_size']} times {heads} heads must equal hidden_size {width}."
        )
    arguments["pad_token_id"] = config.get("padding_idx", config.get("pad_token_id", 0))
    # Not from num_hidden_layers: the generator of v3 has half the layers of the configuration beside it, the discriminator's.
    layers = {int(match[1]) for name in official if (match := re.match(r"deberta\.encoder\.layer\.(\d+)\.", name))}
    if not layers:
        raise ConversionError(
            "The checkpoint has no layers under deberta.encoder.layer, so it is not a DeBERTa model."
        )
    arguments["num_hidden_layers"] = max(layers) + 1
    arguments["norm_rel_ebd"] = "layer_norm" if "layer_norm" in arguments["norm_rel_ebd"] else "none"
    return arguments


def _split_projections(official: StateDict, num_heads: int) -> dict[str, torch.Tensor]:
    """Names and shapes of v2 for the weights of v1: `in_proj` holds queries, keys and values head by head."""
    split = {}
    for name, tensor in _V1_NAMES.state_dict(official).items():
        owner, _, rest = name.rpartition("self.")
        if rest == "in_proj.weight":
            parts = tensor.unflatten(0, (num_heads, 3, -1)).unbind(1)
            for part, projection in zip(parts, ("query", "key", "value"), strict=True):
                split[f"{owner}self.{projection}_proj.weight"] = part.flatten(0, 1)
            split[f"{owner}self.key_proj.bias"] = tensor.new_zeros(tensor.shape[0] // 3)
            continue
        if rest == "pos_key_proj.weight":
            split[f"{owner}self.pos_key_proj.bias"] = tensor.new_zeros(tensor.shape[0])
        split[name] = tensor
    return split


def _convert_classifier(official: StateDict, config: OfficialArguments, arguments: dict, fused: bool) -> Converted:
    arguments |= {
        "num_labels": config.get("num_labels", official["classifier.weight"].shape[0]),
        "cls_dropout": config.get("drop_out", config.get("cls_dropout")),
        "pooler_hidden_act": config.get("pooler_hidden_act", "gelu"),
        "pooler_dropout": config.get("pooler_dropout", 0),
    }
    if fused:
        arguments = {name: value for name, value in arguments.items() if name not in _V2_ONLY}
    elif arguments["embedding_size"] is None:
        del arguments["embedding_size"]
    # A classifier that was trained on from a masked language model has kept its head.
    rules = [(r"^lm_predictions\.", None), KEEP]
    if not arguments.get("position_biased_input", True):
        rules.insert(0, (re.escape(_POSITIONS), None))
    dropped, state = Renaming(*rules).dropped(official), Renaming(*rules).state_dict(official)
    if fused:
        return Converted(DebertaForSequenceClassification, DebertaConfig(**arguments), state, dropped)
    return Converted(DebertaV2ForSequenceClassification, DebertaV2Config(**arguments), state, dropped)
