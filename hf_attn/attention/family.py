"""Base class of model families whose attention is not softmax."""

from typing import ClassVar

from .interface import Mechanism


class OwnAttentionMixin:
    """Ties the models of a family to one mechanism.

    transformers accepts any registered name as `attn_implementation`; for a family that computes something else than
    softmax most of them would silently change the function. Without a choice the family runs the mechanism's automatic
    implementation; `"eager"` is its readable specification.
    """

    attention_mechanism: ClassVar[Mechanism]
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve `attn_implementation` of this family.

        Raises:
            ValueError: for a name that is not one of the mechanism's.
        """
        if requested_attention is None:
            return self.attention_mechanism.name
        served = ("eager", *self.attention_mechanism.names)
        if requested_attention not in served:
            raise ValueError(
                f"{type(self).__name__} computes {self.attention_mechanism.name} attention and does not support "
                f"attn_implementation={requested_attention!r}. Use one of {', '.join(served)}."
            )
        return requested_attention
