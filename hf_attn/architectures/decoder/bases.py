"""The bases that `from_base` accepts: Llama, and the architectures that differ from it in a few fields."""

from transformers import PreTrainedConfig

from ...checkpoints.from_base import FromBaseMixin


#: model type of a base -> fields in which its layers differ from Llama's
BASES = {
    "llama": {},
    "mistral": {"attention_bias": False},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
}


class FromLlamaMixin(FromBaseMixin):
    """Gives a family on the decoder body `from_base` for the bases in [`BASES`] and for its own models."""

    #: whether layers may have sliding windows
    takes_sliding_windows: bool = True

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> PreTrainedConfig:
        """The family's configuration for a base.

        Raises:
            ValueError: for another architecture, or, if the family cannot have them, for a base with sliding windows.
        """
        config_class = cls.config_class
        model_type = base_config.model_type
        supported = (*BASES, config_class.model_type)
        if model_type not in supported:
            raise ValueError(
                f"{cls.__name__} cannot be made from a {model_type!r} model. Supported bases: {', '.join(supported)}."
            )
        fields = config_class.__dataclass_fields__
        values = {name: value for name, value in base_config.to_dict().items() if name in fields}
        for name in ("architectures", "model_type", "transformers_version"):
            values.pop(name, None)
        values.update(BASES.get(model_type, {}))
        if not cls.takes_sliding_windows:
            window = values.pop("sliding_window", None)
            types = values.pop("layer_types", None)
            if window is not None and (types is None or "sliding_attention" in types):
                raise ValueError(
                    f"The base has sliding-window attention ({window} tokens); {cls.__name__} needs a base with full "
                    "attention."
                )
        return config_class(**{**values, **overrides})
