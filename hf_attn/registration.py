"""Turns the catalogue into registrations with transformers and PEFT, without importing either.

Every registration waits until the module that it fills has been imported (or is done at once if it has been), so
`import hf_attn` costs next to nothing and works before or after `import transformers` and `import peft`.

transformers' own `register` methods take classes, and so would import every model file. They fill the dictionary
`_extra_content` of a mapping; a [`LazyContent`] is put in its place, which imports a class when it is looked
up. `_extra_content` is the one private name of transformers that registration leans on.
"""

from collections.abc import Callable, Hashable
from functools import cache
from importlib import import_module
from types import ModuleType

from ._import_hooks import when_imported
from .catalog import DISTRIBUTED_ATTENTION, OWN_AUTO_CLASSES, TASKS, families


def load(reference: str) -> type:
    """Import `package.module.Class`."""
    module, name = reference.rsplit(".", 1)
    return getattr(import_module(module), name)


def _name(key: Hashable) -> str | None:
    return f"{key.__module__}.{key.__qualname__}" if isinstance(key, type) else key


class LazyContent(dict):
    """A dictionary whose entries can be import references, which are resolved on access.

    Args:
        content: entries that exist already.
        references: key -> `package.module.Class`.
        keys_are_classes: whether the keys are such references too (model mappings are keyed by config class).
        as_value: makes the value of an entry of its class; the class itself if not given.
    """

    def __init__(
        self,
        content: dict,
        references: dict[str, str],
        keys_are_classes: bool,
        as_value: Callable[[type], object] | None = None,
    ):
        super().__init__(content)
        self._references = dict(references)
        self._keys_are_classes = keys_are_classes
        self._as_value = as_value or (lambda found: found)

    def _resolve(self, name: str) -> None:
        reference = self._references.get(name)
        if reference is None:  # another thread was faster
            return
        key = load(name) if self._keys_are_classes else name
        super().setdefault(key, self._as_value(load(reference)))
        self._references.pop(name, None)

    def _resolve_all(self) -> None:
        for name in list(self._references):
            self._resolve(name)

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or _name(key) in self._references

    def __getitem__(self, key):
        if not super().__contains__(key):
            self._resolve(_name(key))
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        # A class of the user replaces one of this package.
        self._references.pop(_name(key), None)
        super().__setitem__(key, value)

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def __len__(self) -> int:
        return super().__len__() + len(self._references)

    def __iter__(self):
        return iter(self.keys())

    def keys(self):
        if self._keys_are_classes:
            self._resolve_all()
        return {**dict.fromkeys(super().keys()), **self._references}.keys()

    def values(self):
        self._resolve_all()
        return super().values()

    def items(self):
        self._resolve_all()
        return super().items()


def _fill(mapping, references: dict[str, str], keys_are_classes: bool = True, as_value=None) -> None:
    if not isinstance(getattr(mapping, "_extra_content", None), dict):
        raise RuntimeError(
            "hf_attn cannot register its families: this version of transformers does not keep registered classes in "
            "`_extra_content`. Install a version that hf_attn supports (see its requirements)."
        )
    mapping._extra_content = LazyContent(mapping._extra_content, references, keys_are_classes, as_value)


def _register_configs(module: ModuleType) -> None:
    _fill(
        module.CONFIG_MAPPING,
        {family.model_type: family.config_reference for family in families()},
        keys_are_classes=False,
    )


def fill_model_mapping(auto_class: type) -> None:
    """Register with an Auto class the models of all families that name it."""
    name = auto_class.__name__
    references = {
        family.config_reference: family.model_reference(name) for family in families() if name in family.models
    }
    _fill(auto_class._model_mapping, references)


def _register_models(module: ModuleType) -> None:
    for name in sorted({name for family in families() for name in family.models} - set(OWN_AUTO_CLASSES)):
        fill_model_mapping(getattr(module, name))


def _by_backend(image_processor_class: type) -> dict[str, type]:
    from transformers.image_processing_backends import PilBackend

    return {"pil" if issubclass(image_processor_class, PilBackend) else "torchvision": image_processor_class}


def _register_processors(auto_class: str, mapping: str, as_value=None) -> Callable[[ModuleType], None]:
    def register_processors(module: ModuleType) -> None:
        references = {
            family.config_reference: family.processor_reference(auto_class)
            for family in families()
            if auto_class in family.processors
        }
        _fill(getattr(module, mapping), references, as_value=as_value)

    return register_processors


def _register_attention(module: ModuleType) -> None:
    # A mechanism without its mask function would drop padding silently, so both are registered at one time.
    from transformers.masking_utils import AttentionMaskInterface

    from .attention import MECHANISMS

    for mechanism in MECHANISMS:
        for name in mechanism.names:
            module.AttentionInterface.register(name, mechanism.attention_function(name))
            AttentionMaskInterface.register(name, mechanism.mask_function)
    for name in DISTRIBUTED_ATTENTION:
        module.AttentionInterface.register(
            name, _imported_when_called("hf_attn.distributed.interface.attention_forward")
        )
        AttentionMaskInterface.register(name, _imported_when_called("hf_attn.distributed.interface.attention_mask"))


def _imported_when_called(reference: str) -> Callable:
    def function(*args, **kwargs):
        return load(reference)(*args, **kwargs)

    return function


def _register_pipelines(module: ModuleType) -> None:
    # `register_pipeline` takes a class, and marks it as code that is copied into every saved pipeline.
    for task in TASKS:
        package = "hf_attn.auto" if task.auto_class in OWN_AUTO_CLASSES else "transformers"
        entry = {"impl": task.pipeline_reference, "pt": (load(f"{package}.{task.auto_class}"),), "type": task.type}
        if task.default_model is not None:
            entry["default"] = {"model": task.default_model}
        module.PIPELINE_REGISTRY.supported_tasks[task.name] = entry


#: tables that name norms or biases, not the linear layers to adapt
_OTHER_PEFT_TABLES = ("LNTUNING_TARGET", "BEFT_TARGET")


def _register_peft_targets(module: ModuleType) -> None:
    # Each tuner has a table of its own, copied from LoRA's when peft was imported.
    for name, table in vars(module).items():
        if not (name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING")):
            continue
        for family in families():
            if isinstance(family.peft, str) and family.peft in table:
                table.setdefault(family.model_type, table[family.peft])
            elif isinstance(family.peft, tuple) and "IA3_FEEDFORWARD" in name:
                # Those of the targets whose inputs are scaled instead of their outputs.
                table.setdefault(family.model_type, [])
            elif isinstance(family.peft, tuple) and not any(other in name for other in _OTHER_PEFT_TABLES):
                table.setdefault(family.model_type, list(family.peft))


def _allow_peft_imports(module: ModuleType) -> None:
    # An adapter without a task type names the class of its model, which PEFT imports only from a list of packages.
    allowed = module.get_default_import_allowlist

    def get_default_import_allowlist() -> list[str]:
        return [*allowed(), "hf_attn"]

    module.get_default_import_allowlist = get_default_import_allowlist


def _register_sigma_reparam_loading(module: ModuleType) -> None:
    from .patching.sigma_reparam.loading import METHOD, SigmaReparamLoader, SigmaReparamLoading

    module.register_quantization_config(METHOD)(SigmaReparamLoading)
    module.register_quantizer(METHOD)(SigmaReparamLoader)


@cache
def register() -> None:
    """Register everything in the catalogue, by `import hf_attn`; a reload does not do it again."""
    when_imported("transformers.models.auto.configuration_auto", _register_configs)
    when_imported("transformers.models.auto.modeling_auto", _register_models)
    auto = "transformers.models.auto"
    when_imported(f"{auto}.processing_auto", _register_processors("AutoProcessor", "PROCESSOR_MAPPING"))
    when_imported(
        f"{auto}.image_processing_auto",
        _register_processors("AutoImageProcessor", "IMAGE_PROCESSOR_MAPPING", _by_backend),
    )
    when_imported(
        f"{auto}.feature_extraction_auto", _register_processors("AutoFeatureExtractor", "FEATURE_EXTRACTOR_MAPPING")
    )
    when_imported(f"{auto}.tokenization_auto", _register_processors("AutoTokenizer", "TOKENIZER_MAPPING"))
    when_imported("transformers.modeling_utils", _register_attention)
    when_imported("transformers.quantizers.auto", _register_sigma_reparam_loading)
    when_imported("transformers.pipelines", _register_pipelines)
    when_imported("peft.utils.constants", _register_peft_targets)
    when_imported("peft.auto", _allow_peft_imports)
