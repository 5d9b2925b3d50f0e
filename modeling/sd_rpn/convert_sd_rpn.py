"""Official checkpoints of SD-RPN (YuHengsss/SD-RPN): complete, "filled" and pruned ones, for LLaVA-1.5 and Qwen2.5-VL.

They hold the base as well, whose weights equal those of the public base; only the region proposal network is taken.
"""

from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_sd_rpn import SdRpnConfig
from .modeling_sd_rpn import SdRpnModel


#: dropped are the base, which users load from where it is published, and the unused head of the network
_NAMES = Renaming(
    (r"^model\.(embed_tokens|layers|norm|mm_projector|vision_tower|image_newline)(\.|$)", None),
    (r"^(lm_head|visual|twig_head)\.", None),
    (r"^model\.twig_(layers|norm)\.", r"\1."),
)

#: settings of the published networks, the only ones that are supported
_PUBLISHED_OPTIONS = {
    "enable_twig": True,
    "roi_branch": True,
    "roi_source": "qk",
    "roi_super_type": "v1",
    "roi_loss": "bce",
}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of a LLaVA or Qwen2.5-VL fork: `model.twig_layers.*` and `model.twig_norm`, with any part of the
            base beside them.
        config: the fields of the checkpoint's `config.json`: `num_hidden_layers` of the whole base, `num_attention_heads`,
            `rms_norm_eps` and `twig_K`, none of which is needed if the network has the width of a published one.

    Raises:
        ConversionError: also if the configuration has another kind of map than the published networks.
    """
    state = _NAMES.state_dict(official)
    if not {"norm.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight"} <= state.keys():
        raise ConversionError(
            "The checkpoint has no model.twig_layers with model.twig_norm. If this is one of several shards, pass "
            "their folder. Otherwise it is a base without a region proposal network."
        )
    _check_options(config)
    config.leave_rest()  # the `config.json` of the base
    return Converted(SdRpnModel, _config(state, config), state, _NAMES.dropped(official))


def _check_options(config: dict) -> None:
    for name, value in _PUBLISHED_OPTIONS.items():
        if config.get(name, value) != value:
            raise ConversionError(
                f"The checkpoint was trained with {name}={config[name]!r}. Only {value!r} is supported, which the "
                "published networks use."
            )


def _config(state: dict, config: dict) -> SdRpnConfig:
    base_model_type = "qwen2_5_vl" if "layers.0.self_attn.q_proj.bias" in state else "llava"
    width = state["norm.weight"].shape[0]
    published = (SdRpnConfig.from_variant(name) for name in SdRpnConfig.variants)
    known = next((c for c in published if (c.base_model_type, c.hidden_size) == (base_model_type, width)), None)

    def given(official_name: str, name: str):
        if official_name in config or known is None:
            return config[official_name]
        return getattr(known, name)

    num_heads = given("num_attention_heads", "num_attention_heads")
    head_dim = width // num_heads
    biases = {"attention_bias": True, "attention_output_bias": False} if base_model_type == "qwen2_5_vl" else {}
    return SdRpnConfig(
        base_model_type=base_model_type,
        base_model_name_or_path=known and known.base_model_name_or_path,
        base_num_hidden_layers=given("num_hidden_layers", "base_num_hidden_layers"),
        branch_layer=given("twig_K", "branch_layer"),
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        hidden_size=width,
        intermediate_size=state["layers.0.mlp.up_proj.weight"].shape[0],
        num_attention_heads=num_heads,
        num_key_value_heads=state["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        rms_norm_eps=given("rms_norm_eps", "rms_norm_eps"),
        hidden_act=config.get("hidden_act", "silu"),
        multi_head=config.get("roi_multi_head", True),
        thresholds=known and known.thresholds,
        **biases,
    )
