"""Auto classes for the tasks of this package that transformers has none for.

They work as transformers' own do (`from_pretrained`, `from_config`), on the families that name them in the
catalogue, and carry the same names here and in `auto_map`.
"""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping, auto_class_update
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .catalog import OWN_AUTO_CLASSES
from .registration import fill_model_mapping


def _auto_class(name: str, head_doc: str) -> type:
    auto_class = type(name, (_BaseAutoModelClass,), {"__module__": __name__})
    auto_class._model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())
    fill_model_mapping(auto_class)
    return auto_class_update(auto_class, head_doc=head_doc)


globals().update({name: _auto_class(name, task) for name, task in OWN_AUTO_CLASSES.items()})

__all__ = list(OWN_AUTO_CLASSES)
