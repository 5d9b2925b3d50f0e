"""Old names of modules that have moved; they still work, with a warning that gives the new name."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


#: old name -> new name, both below `hf_attn`
MOVED = {
    "assets": "examples.assets",
    "base_transfer": "checkpoints.from_base",
    "checkpoint_files": "checkpoints.files",
    "conversion": "checkpoints.official",
    "imaging": "architectures.imaging",
    "layers": "architectures.layers",
    "modeling.echo_att.distillation_echo_att": "modeling.echo_att.distillation",
    "modeling.landmark.cache_landmark": "modeling.landmark.cache",
    "modeling.landmark.data_landmark": "modeling.landmark.data",
    "modeling.landmark.reading_landmark": "modeling.landmark.reading",
    "modeling.sd_rpn.generation_sd_rpn": "modeling.sd_rpn.generation",
    "modeling.sd_rpn.labels_sd_rpn": "modeling.sd_rpn.labels.rule",
    "modeling.sd_rpn.training_sd_rpn": "modeling.sd_rpn.training",
    "output_folder": "training.output_folder",
    "patching.clear_distillation": "patching.clear.distillation",
    "patching.clear_high_resolution": "patching.clear.high_resolution",
    "patching.clear_parallel": "patching.clear.parallel",
    "patching.clear_weights": "patching.clear.weights",
    "patching.sigma_reparam_loading": "patching.sigma_reparam.loading",
    "quickstart": "examples.quickstart",
    "restoration.configuration": "architectures.restoration.configuration",
    "restoration.layers": "architectures.restoration.layers",
    "restoration.memory": "architectures.restoration.memory",
    "restoration.modeling": "architectures.restoration.modeling",
    "restoration.warm_start": "architectures.restoration.warm_start",
    "staged_training": "training.stages",
    "variants": "architectures.variants",
}


class _MovedFinder(MetaPathFinder, Loader):
    """Finds a module under its old name: the very module of the new name."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "hf_attn" and name in MOVED else None

    def create_module(self, spec):
        new_name = f"hf_attn.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new_name}.", DeprecationWarning, stacklevel=2)
        return None

    def exec_module(self, module):
        sys.modules[module.__name__] = import_module(f"hf_attn.{MOVED[module.__name__.partition('.')[2]]}")


def install() -> None:
    """Let the old names be imported, after everything that exists."""
    sys.meta_path.append(_MovedFinder())
