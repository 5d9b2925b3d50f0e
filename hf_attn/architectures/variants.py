"""Published variants of a family, as data beside its configuration."""

from typing import Any, ClassVar


class VariantsMixin:
    """Gives a configuration class its published variants by name."""

    #: variant -> the fields in which it differs from the defaults
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def from_variant(cls, name: str, **overrides):
        """Build the configuration of a published variant.

        Args:
            name: key of :attr:`variants`.
            overrides: fields to set differently.

        Raises:
            ValueError: if there is no such variant; the message lists the ones that exist.
        """
        if name not in cls.variants:
            raise ValueError(f"{cls.__name__} has no variant {name!r}. Variants: {', '.join(cls.variants)}.")
        fields = {**cls.variants[name], **overrides}
        if "id2label" in overrides:
            # Labels given by name are counted by transformers.
            fields.pop("num_labels", None)
        return cls(**fields)
