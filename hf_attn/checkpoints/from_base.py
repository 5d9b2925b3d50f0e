"""Models of a family from pretrained transformers checkpoints."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..attention.family import OwnAttentionMixin
from ..hub import hub_id
from .quiet import quietly


@dataclass(frozen=True)
class BaseReport:
    """The tensors of a base model that were kept, dropped or added.

    Attributes:
        base: Hub id or folder of the base, empty if a model object without one was given.
        kept: names of tensors taken over as they are.
        dropped: names of base tensors that the new model has no place for, by design.
        new: names of tensors that the base did not have, freshly initialised.
        kept_parameters, dropped_parameters, new_parameters: the numbers of their elements. Tied tensors, such as the
            embeddings and the head, are one tensor.
    """

    base: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    kept_parameters: int
    dropped_parameters: int
    new_parameters: int

    def __str__(self) -> str:
        lines = [
            f"{what:8}{number:>14,} parameters in {len(names)} tensors"
            for what, names, number in (
                ("kept", self.kept, self.kept_parameters),
                ("dropped", self.dropped, self.dropped_parameters),
                ("new", self.new, self.new_parameters),
            )
        ]
        return "\n".join(lines)


class FromBaseMixin:
    """Gives a family `from_base`: the weights of a pretrained model, another mechanism.

    A family says which bases it understands ([`config_from_base`]), what their tensors are called here
    ([`state_from_base`]), and which of them it drops ([`dropped_from_base`]) or adds ([`new_to_base`]); every
    other tensor has to be taken over, and every other tensor of the new model filled.
    """

    #: Auto class of the bases
    base_auto_class: ClassVar[type] = AutoModelForCausalLM

    base_report: BaseReport | None = None

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> PreTrainedConfig:
        """The family's configuration for a base; raises `ValueError` for an architecture that is not supported."""
        raise NotImplementedError(f"{cls.__name__} does not define how to derive its configuration from a base.")

    @classmethod
    def state_from_base(cls, state: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """The kept tensors of a base under the names, and in the shapes, of this family."""
        return state

    @classmethod
    def dropped_from_base(cls, name: str, config: PreTrainedConfig) -> bool:
        """Whether the base tensor `name` has no place in a model of this configuration, by design."""
        return False

    @classmethod
    def new_to_base(cls, name: str, config: PreTrainedConfig) -> bool:
        """Whether the family's tensor `name` is its own addition, which no base has."""
        return False

    @classmethod
    def from_base(cls, base: PreTrainedModel | str | Path, dtype=None, **overrides):
        """Make a model of this family from a pretrained one.

        Args:
            base: a model, a Hub id or a folder. A model object is not changed; its weights are copied.
            dtype: dtype to load a checkpoint in; its own if not given.
            overrides: fields of the family's configuration.

        Returns:
            The model, in eval mode, with `base_report` telling which tensors were kept, dropped and new.

        Raises:
            ValueError: if the architecture of the base is not supported, or if a tensor is unaccounted for.
        """
        if not isinstance(base, PreTrainedModel):
            # Refuses an unsupported architecture before the weights are read.
            cls.config_from_base(AutoConfig.from_pretrained(base), **overrides)
            base = cls.base_auto_class.from_pretrained(base, dtype=dtype or "auto")
        config = cls.config_from_base(base.config, **overrides)
        if not issubclass(cls, OwnAttentionMixin):
            config._attn_implementation = base.config._attn_implementation

        tied = base.all_tied_weights_keys
        base_state = {name: tensor for name, tensor in base.state_dict().items() if name not in tied}
        model = cls.from_base_state(
            base_state, config, type(base).__name__, base_name=base.config.name_or_path or "", dtype=base.dtype
        )
        if base.can_generate() and model.can_generate():
            model.generation_config = copy.deepcopy(base.generation_config)
        return model.to(base.device)

    @classmethod
    def from_base_state(
        cls,
        base_state: dict[str, torch.Tensor],
        config: PreTrainedConfig,
        base_class: str,
        base_name: str = "",
        dtype: torch.dtype | None = None,
    ):
        """Make a model of this family from the tensors of a base, which are copied.

        Args:
            base_state: tensors under the base's names, tied ones once.
            config: the family's configuration.
            base_class: name of the base's class, for error messages.
            base_name: Hub id or folder of the base, for the report.
            dtype: dtype of the model.

        Raises:
            ValueError: if a tensor is unaccounted for.
        """
        dropped = tuple(name for name in base_state if cls.dropped_from_base(name, config))
        kept_state = {name: tensor.clone() for name, tensor in base_state.items() if name not in dropped}
        with quietly():  # every tensor is accounted for below
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=cls.state_from_base(kept_state, config),
                output_loading_info=True,
                dtype=dtype,
            )
        new = tuple(sorted(info["missing_keys"]))
        unfilled = [name for name in new if not cls.new_to_base(name, config)]
        if info["unexpected_keys"] or unfilled:
            raise ValueError(
                f"{base_class} is not a valid base for {cls.__name__}. Unused tensors of the base: "
                f"{', '.join(sorted(info['unexpected_keys'])) or 'none'}; tensors that the base lacks: "
                f"{', '.join(unfilled) or 'none'}."
            )
        # Saved with the configuration, so that a saved model still names its base.
        if (base := hub_id(base_name)) is not None:
            model.config.base_model_name_or_path = base
        state = model.state_dict()
        model.base_report = BaseReport(
            base=base_name,
            kept=tuple(kept_state),
            dropped=dropped,
            new=new,
            kept_parameters=sum(tensor.numel() for tensor in kept_state.values()),
            dropped_parameters=sum(base_state[name].numel() for name in dropped),
            new_parameters=sum(state[name].numel() for name in new),
        )
        return model.eval()
