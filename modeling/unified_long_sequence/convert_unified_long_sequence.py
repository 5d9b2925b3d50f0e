"""Weights of a single token mixer, `(in, out)` matrices under the names of the template's table -> [`TokenMixer`]."""

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming
from hf_attn.mixers import MIXERS


_NAMES = Renaming(
    (r"^w_([qkv])$", r"\1_proj.weight"),
    (r"^(features|e|f|mix_1|mix_2|gate|gate_bias|random_logits|aft_bias|kernel)$", r"\1"),
)


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Make one mixer of a state dict that may hold the weights of several.

    Args:
        official: `w_q`, `w_k`, `w_v`, which multiply from the right, and what the mixer has besides.
        config: `mixer`, a name of the registry, `embed_dim` and `length`; `head_dim`, `rank`, `landmarks`, `window` and `causal`
            where they matter.
    """
    name = config["mixer"]
    if name not in MIXERS:
        raise ConversionError(f"There is no token mixer {name!r}. Mixers: {', '.join(MIXERS)}.")
    options = {
        ours: config[theirs]
        for theirs, ours in (
            ("head_dim", "head_dim"),
            ("rank", "rank"),
            ("landmarks", "num_landmarks"),
            ("window", "window"),
            ("causal", "causal"),
        )
        if theirs in config
    }
    options |= {"hidden_size": config["embed_dim"], "max_length": config["length"]}
    if "mix_1" in official:
        options["mixing_size"] = official["mix_1"].shape[0]
    wanted = MIXERS[name](**options).state_dict()
    state = {
        name: tensor.T.contiguous() if name.endswith("_proj.weight") else tensor
        for name, tensor in _NAMES.state_dict(official).items()
        if name in wanted
    }
    options["dtype"] = next(iter(state.values()), torch.empty(0)).dtype
    return Converted(MIXERS[name], options, state)
