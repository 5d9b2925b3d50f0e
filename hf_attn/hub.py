"""Files of a saved model for the Hub: a stub for `trust_remote_code` and a model card.

Someone who has the package installed but did not import it loads such a folder with `trust_remote_code=True`; someone
who has not installed it is told by transformers which package to install. Both are written by `save_pretrained`, so
that every way to save or push a model (`push_to_hub`, `Trainer`) includes them.

`save_pretrained` and `push_to_hub` write a card where there is none; one that a folder or a repository has already is
kept. For that [`HubModelMixin`] extends `PushToHubMixin._upload_modified_files`, a private name of transformers:
the public ways to push put a generic card in the place of ours.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .catalog import TASKS, Family, Paper, find_family


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


STUB_NAME = "modeling_hf_attn"
CARD_NAME = "README.md"

_STUB = Template('''\
"""Loads this model through the hf_attn package (`pip install hf_attn`); it holds no code of its own."""

import hf_attn  # noqa: F401
from $config_module import $config
from $model_module import $models


__all__ = [$names]
''')

#: Auto class -> task of the Hub. A model without a head is a feature extractor in every family.
_PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageToImage": "image-to-image",
    "AutoModelForTimeSeriesPrediction": "time-series-forecasting",
    "AutoBackbone": "image-feature-extraction",
    "AutoModelForDocumentMatching": "text-classification",
    "AutoModelForAudioTextClassification": "audio-classification",
}
_HEADLESS_TAGS = {"pixel_values": "image-feature-extraction"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: an example for a task that the Hub does not have
_OTHER_TASK = re.compile(rf'pipeline\("({"|".join(task.name for task in TASKS)})"')

#: fields of a configuration that say little about the model; the labels of a classifier can be thousands
_BOOKKEEPING = ("architectures", "auto_map", "dtype", "id2label", "label2id", "transformers_version")


def auto_map(family: Family) -> dict[str, str]:
    """`auto_map` of a family's `config.json`: Auto class -> class in the stub."""
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


def model_card(
    model: "nn.Module",
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    evaluation: Mapping[str, float] | None = None,
    training: Mapping[str, object] | None = None,
) -> str:
    """Text of a model's card: the template of its paper, filled with what the model is.

    Args:
        model: a model of one of the families; wrappers (`torch.compile`, distributed training, PEFT) are looked through.
        repo_id: name of the repository or folder that users load it from.
        base_model: Hub id, or folder with a card, of the model that it was made from; the one that it was made or loaded
            from, if that is known.
        license: licence of the weights, as a key of the Hub. If it is not given, the card refers to the licence of the base
            model; without one it is `unknown`.
        language: ISO codes of the languages.
        datasets: Hub ids of the datasets of training.
        tags: tags besides those of the template.
        evaluation: name of a metric -> value, as they should appear in the card.
        training: name of a hyperparameter -> value.

    Raises:
        ValueError: if the model belongs to no family of this package.
    """
    from huggingface_hub import ModelCard

    model = _unwrap(model)
    paper, family = find_family(model.config.model_type)
    facts = _facts(model, paper, family, repo_id)
    template = resources.files("hf_attn.model_cards").joinpath(f"{paper.slug}.md").read_text(encoding="utf-8")
    card = ModelCard(Template(template).substitute(facts))

    for name, value in {"license": "unknown", **_origin(model, base_model, repo_id)}.items():
        card.data[name] = value
    if license is not None:
        card.data.license = license
        for name in ("license_name", "license_link"):
            card.data.pop(name, None)
    if language is not None:
        card.data.language = language
    if datasets:
        card.data.datasets = list(datasets)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))

    text = str(card)
    if facts["is_headless"] and _OTHER_TASK.search(text):
        text = _without_head(text, facts, family)
    text, citation, rest = text.partition("## Citation")
    sections = [text.rstrip()]
    if evaluation:
        sections.append("## Evaluation\n\n" + _table(("Metric", "Value"), evaluation))
    if training:
        sections.append("## Training\n\n" + _table(("Hyperparameter", "Value"), training))
    return "\n\n".join([*sections, citation + rest]).rstrip() + "\n"


def write_model_card(folder: str | Path, model: "nn.Module", repo_id: str | None = None, **facts) -> Path:
    """Write a model's card into a folder, and overwrite an existing card.

    `save_pretrained` writes a card automatically; use this function to add facts that the model cannot know.

    Args:
        folder: where the model has been saved.
        model: the model.
        repo_id: name of the repository that users load it from.
        facts: further facts, see [`model_card`].

    Returns:
        Path of the card.
    """
    card = Path(folder) / CARD_NAME
    card.write_text(model_card(model, repo_id, **facts), encoding="utf-8")
    return card


def _unwrap(model: "nn.Module") -> "PreTrainedModel":
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _facts(model: "PreTrainedModel", paper: Paper, family: Family, repo_id: str | None) -> dict[str, str]:
    auto_class, model_class = _classes(model, family)
    headless = auto_class == "AutoModel" and len(family.models) > 1
    tag = _HEADLESS_TAGS.get(model.main_input_name, "feature-extraction") if headless else None
    return {
        "repo_id": repo_id or f"your-name/{family.model_type}",
        "name": (repo_id or model_class).rsplit("/", 1)[-1],
        "title": paper.title,
        "arxiv": paper.arxiv,
        "auto_class": auto_class,
        "model_class": model_class,
        "model_type": family.model_type,
        "is_headless": headless,
        "pipeline_tag": tag or _PIPELINE_TAGS.get(auto_class, family.pipeline_tag or "other"),
        "num_parameters": f"{model.num_parameters():,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": json.dumps(_changed_fields(model.config), indent=2, sort_keys=True, default=str),
    }


def _changed_fields(config: "PreTrainedConfig") -> dict[str, object]:
    """Fields of a configuration that differ from the defaults of its class."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if name in defaults and name not in _BOOKKEEPING and value != defaults[name]
    }


def _classes(model: "PreTrainedModel", family: Family) -> tuple[str, str]:
    """Auto class and class of a model, which may be a subclass, as created by sharded training or by users."""
    auto_classes = {model_class: auto_class for auto_class, model_class in family.models.items()}
    for parent in type(model).__mro__:
        if parent.__name__ in auto_classes:
            return auto_classes[parent.__name__], parent.__name__
    return "AutoModel", type(model).__name__


def _without_head(text: str, facts: Mapping[str, str], family: Family) -> str:
    """The card with an example that a model without a head can run."""
    use, configuration = text.index("## Use"), text.index("## Configuration")
    install = re.search(r"    pip install .*", text[use:configuration])
    heads = [name for auto, name in family.models.items() if auto not in ("AutoModel", "AutoBackbone")]
    example = f"""## Use

{install[0] if install else "    pip install hf_attn"}

```python
import hf_attn  # registers the model type; without it, pass trust_remote_code=True
from transformers import AutoModel

model = AutoModel.from_pretrained("{facts["repo_id"]}")
```

The model has no head and returns features. {" and ".join(f"`{head}.from_pretrained`" for head in heads)} would add a head with
random weights, which has to be trained first.

"""
    return text[:use] + example + text[configuration:]


def hub_id(name: str | Path | None) -> str | None:
    """The name of a model if it is a Hub id and no folder; else the base model that the card in the folder names."""
    name = str(name or "")
    if name and Path(name).is_dir():
        base = _card_data(Path(name)).get("base_model")
        base = base[0] if isinstance(base, list) and base else base
        return base if isinstance(base, str) and _HUB_ID.fullmatch(base) else None
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _origin(model: "PreTrainedModel", base_model: str | None, repo_id: str | None) -> dict[str, str]:
    """Base model and licence as fields of a card, if they are known.

    The card in the folder that a model was loaded from has facts that the model does not have.
    """
    report = getattr(model, "base_report", None)
    for name in (base_model, getattr(report, "base", None), model.config.name_or_path):
        if name and Path(name).is_dir():
            data = _card_data(Path(name))
            known = {field: data[field] for field in ("license", "license_name", "license_link") if data.get(field)}
            if (base := hub_id(name)) is not None and base != repo_id:
                known = {"base_model": base, **(known or _licence_of(base))}
            if known:
                return known
        elif (base := hub_id(name)) is not None and base != repo_id:
            return {"base_model": base, **_licence_of(base)}
    base = hub_id(getattr(model.config, "base_model_name_or_path", None))
    return {} if base is None or base == repo_id else {"base_model": base, **_licence_of(base)}


def _licence_of(base: str) -> dict[str, str]:
    return {
        "license": "other",
        "license_name": "as-the-base-model",
        "license_link": f"https://huggingface.co/{base}",
    }


def _card_data(folder: Path) -> dict[str, object]:
    """Metadata of the card in a folder; none if there is no card, or one that cannot be read."""
    from huggingface_hub import ModelCard

    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (OSError, ValueError):
        return {}


def _table(header: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Text of a table's cell: six significant digits, and never a whole number for one that is not."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        if math.isfinite(value) and ("e+" in text or (float(text).is_integer() and not value.is_integer())):
            text = repr(value)
        return text
    return " ".join(str(value).split()).replace("|", r"\|")


def _family_of(config: "PreTrainedConfig") -> Family | None:
    """Family of a configuration; none for a user's own model type derived from one of ours."""
    try:
        return find_family(config.model_type)[1]
    except ValueError:
        return None


class HubConfigMixin:
    """Configuration that writes its Hub stub and names it in `auto_map`."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: transformers would copy the source file over the stub."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save the configuration and its stub; see transformers' `PreTrainedConfig.save_pretrained`."""
        family = _family_of(self)
        if family is not None:
            write_stub(save_directory, family)
            self.auto_map = auto_map(family)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class HubModelMixin:
    """Model whose `save_pretrained` writes a model card."""

    #: card of the folder that is being saved to
    _folder_card: bytes | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: transformers would copy the source file over the stub."""

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Save the model with its stub and, unless the folder has one, its model card."""
        readme = Path(save_directory) / CARD_NAME
        self._folder_card = readme.read_bytes() if readme.is_file() else None
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self._folder_card = None
        if self._has_card() and self.should_save_on_this_rank(is_main_process) and not readme.exists():
            write_model_card(save_directory, self)

    def _has_card(self) -> bool:
        # Saving a model with adapters saves the adapters only, and their card is PEFT's business.
        return _family_of(self.config) is not None and not getattr(self, "_hf_peft_config_loaded", False)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # Both ways of transformers to push a model end here, after a generic card has been put in the place of any other
        # unless the repository has one.
        from huggingface_hub import ModelCard, file_exists

        if self._has_card() and not file_exists(repo_id, CARD_NAME, token=kwargs.get("token")):
            readme = Path(working_dir) / CARD_NAME
            tags = ModelCard.load(readme).data.tags or ()
            if self._folder_card is not None:
                readme.write_bytes(self._folder_card)
            else:
                write_model_card(working_dir, self, repo_id, tags=tags)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


class HubTrainerMixin:
    """Trainer that writes the model card of the family, with its facts about the training.

        class Trainer(HubTrainerMixin, transformers.Trainer): ...

    A plain Trainer works as well; it pushes its generic card, and during training (`hub_strategy="every_save"`) it
    pushes no stub.
    """

    def init_hf_repo(self, *args, **kwargs):
        """Create the repository, and add the stub to the weights that are pushed during training."""
        super().init_hf_repo(*args, **kwargs)
        family = self._family()
        if family is not None and self.is_world_process_zero():
            write_stub(self.args.output_dir, family)

    def create_model_card(self, **kwargs):
        """Write the model card into `output_dir`; see transformers' `Trainer.create_model_card`."""
        if self._family() is None:
            super().create_model_card(**kwargs)
            return
        if not self.is_world_process_zero():
            return
        from transformers.modelcard import TrainingSummary

        summary = TrainingSummary.from_trainer(self, **kwargs)
        write_model_card(
            self.args.output_dir,
            self.model,
            self.hub_model_id,
            base_model=kwargs.get("finetuned_from"),
            license=summary.license,
            language=summary.language,
            datasets=_as_list(summary.dataset_tags),
            tags=_as_list(summary.tags),
            evaluation=summary.eval_results,
            training=summary.hyperparameters,
        )

    def _family(self) -> Family | None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_adapted = hasattr(model, "peft_config")
        return None if is_adapted or not hasattr(model, "config") else _family_of(model.config)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
