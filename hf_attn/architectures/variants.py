"""Named configurations of a family, defined next to its configuration class."""

from typing import Any, ClassVar

from .ranges import RangesMixin


#: name of the variant with which tests and documentation run
TINY = "tiny"


class VariantsMixin(RangesMixin):
    """Gives a configuration class its published variants and a tiny one by name, and ranges for its fields."""

    #: published variant -> the fields in which it differs from the defaults
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    #: fields of the smallest configuration with all features of the family; its model runs in milliseconds
    tiny: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_variant(cls, name: str, **overrides):
        """Build the configuration of a variant.

        Args:
            name: key of [`variants`], or `"tiny"`.
            overrides: fields to set differently.

        Raises:
            ValueError: if there is no such variant; the message lists the ones that exist.
        """
        variants = {**cls.variants, **({TINY: cls.tiny} if cls.tiny else {})}
        if name not in variants:
            raise ValueError(f"{cls.__name__} has no variant {name!r}. Variants: {', '.join(variants)}.")
        fields = {**variants[name], **overrides}
        if "id2label" in overrides:
            # Labels given by name are counted by transformers.
            fields.pop("num_labels", None)
        return cls(**fields)
