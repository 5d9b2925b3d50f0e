"""What makes a saved folder at home on the Hub: a stub for ``trust_remote_code`` and a model card.

Someone who has the package installed but did not import it loads such a folder with ``trust_remote_code=True``; someone
who has not installed it is told by transformers which package to install. Both are written by ``save_pretrained``, so
that whatever saves or pushes a model (``push_to_hub``, ``Trainer``) carries them along.
"""

import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .catalog import Family, Paper, find_family


if TYPE_CHECKING:
    from transformers import PreTrainedModel


STUB_NAME = "modeling_hf_attn"

_STUB = Template('''\
"""Loads this model through the hf_attn package (`pip install hf_attn`); it holds no code of its own."""

import hf_attn  # noqa: F401
from $config_module import $config
from $model_module import $models


__all__ = [$names]
''')


def auto_map(family: Family) -> dict[str, str]:
    """``auto_map`` of a family's ``config.json``: Auto class -> class in the stub."""
    models = {auto_class: f"{STUB_NAME}.{model}" for auto_class, model in family.models.items()}
    return {"AutoConfig": f"{STUB_NAME}.{family.config}", **models}


def write_stub(folder: str | Path, family: Family) -> None:
    """Write the stub module of a family into a folder, which is created if it does not exist."""
    models = sorted(set(family.models.values()))
    stub = _STUB.substitute(
        config_module=family.config_reference.rsplit(".", 1)[0],
        config=family.config,
        model_module=family.model_reference(next(iter(family.models))).rsplit(".", 1)[0],
        models=", ".join(models),
        names=", ".join(f'"{name}"' for name in (family.config, *models)),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{STUB_NAME}.py").write_text(stub, encoding="utf-8")


def model_card(model: "PreTrainedModel", repo_id: str | None = None) -> str:
    """Text of a model's card: the template of its paper, filled with what the model is.

    Args:
        model: a model of one of the families.
        repo_id: name of the repository or folder that users load it from.
    """
    paper, family = find_family(model.config.model_type)
    template = resources.files("hf_attn.model_cards").joinpath(f"{paper.slug}.md").read_text(encoding="utf-8")
    return Template(template).substitute(_facts(model, paper, family, repo_id))


def _facts(model: "PreTrainedModel", paper: Paper, family: Family, repo_id: str | None) -> dict[str, str]:
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if key not in ("auto_map", "transformers_version", "dtype", "architectures")
    }
    return {
        "repo_id": repo_id or f"your-name/{family.model_type}",
        "title": paper.title,
        "arxiv": paper.arxiv,
        "model_class": type(model).__name__,
        "model_type": family.model_type,
        "num_parameters": f"{model.num_parameters():,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": json.dumps(config, indent=2, sort_keys=True, default=str),
    }


class HubConfigMixin:
    """Configuration that writes its Hub stub and names it in ``auto_map``."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: transformers would copy the source file over the stub."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save the configuration and its stub; see transformers' `PreTrainedConfig.save_pretrained`."""
        _, family = find_family(self.model_type)
        write_stub(save_directory, family)
        self.auto_map = auto_map(family)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class HubModelMixin:
    """Model that writes its model card beside its weights."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: transformers would copy the source file over the stub."""

    def save_pretrained(self, save_directory, **kwargs):
        """Save the model with its stub and, unless the folder has one, its model card."""
        super().save_pretrained(save_directory, **kwargs)
        readme = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and readme.parent.is_dir() and not readme.exists():
            readme.write_text(model_card(self), encoding="utf-8")
