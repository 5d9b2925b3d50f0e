"""Weights of a single token mixer, `(in, out)` matrices under the names of the template's table -> [`TokenMixer`]."""

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.mixers import MIXERS


_PROJECTIONS = {"w_q": "q_proj.weight", "w_k": "k_proj.weight", "w_v": "v_proj.weight"}
_OTHERS = ("features", "e", "f", "mix_1", "mix_2", "gate", "gate_bias", "random_logits", "aft_bias", "kernel")


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
    state = {ours: official[theirs].T.contiguous() for theirs, ours in _PROJECTIONS.items() if ours in wanted}
    state |= {name: official[name] for name in _OTHERS if name in wanted}
    options["dtype"] = next(iter(state.values()), torch.empty(0)).dtype
    return Converted(MIXERS[name], options, state, dropped=(*_PROJECTIONS, *_OTHERS))
