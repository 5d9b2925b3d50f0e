"""The catalogue: one declarative entry for each paper, plain data, imported by everything and importing nothing heavy.

Registration, conversion, Hub stubs, PEFT defaults, the command line, the documentation and the test battery are all
driven by it. A class is named by the convention of the package: `hf_attn.modeling.<folder>.<kind>_<folder>.<Class>`,
where the kind is `configuration`, `modeling` or `processing`. It is imported only when it is needed.
"""

from . import domains, images, text
from .entries import Family, Paper, Task
from .text import DISTRIBUTED_ATTENTION


__all__ = [
    "DISTRIBUTED_ATTENTION",
    "OWN_AUTO_CLASSES",
    "PACKAGE_DOORS",
    "PAPERS",
    "TASKS",
    "Family",
    "Paper",
    "Task",
    "families",
    "find_family",
    "get_paper",
    "paper_references",
    "public_names",
]

_PAPERS = (*text.PAPERS, *images.PAPERS, *domains.PAPERS)

TASKS = (
    Task(
        name="image-restoration",
        pipeline="ImageRestorationPipeline",
        auto_class="AutoModelForImageToImage",
        type="image",
        default_model=("caidas/swin2SR-classical-sr-x2-64", "main"),
    ),
    Task(
        name="focused-image-text-to-text",
        pipeline="FocusedImageTextToTextPipeline",
        auto_class="AutoModelForImageTextToText",
        type="multimodal",
        default_model=("llava-hf/llava-1.5-7b-hf", "main"),
    ),
    Task(
        name="traffic-forecasting",
        pipeline="TrafficForecastingPipeline",
        auto_class="AutoModelForTimeSeriesPrediction",
        type="multimodal",
    ),
    Task(
        name="scanpath-prediction",
        pipeline="ScanpathPredictionPipeline",
        auto_class="AutoModelForScanpathPrediction",
        type="image",
    ),
    Task(
        name="audio-text-classification",
        pipeline="AudioTextClassificationPipeline",
        auto_class="AutoModelForAudioTextClassification",
        type="multimodal",
    ),
)

#: Auto class of this package (see [`hf_attn.auto`]) -> name of its task
OWN_AUTO_CLASSES: dict[str, str] = {
    "AutoModelForDocumentMatching": "document matching",
    "AutoModelForAudioTextClassification": "classification of audio with a transcript",
    "AutoModelForScanpathPrediction": "scanpath prediction",
}

#: public names that belong to no paper -> `package.module.name`
PACKAGE_DOORS: dict[str, str] = {
    "PAPERS": "hf_attn.catalog.PAPERS",
    "from_official": "hf_attn.checkpoints.official.from_official",
    "uses_attention": "hf_attn.attention.interface.uses_attention",
    "SequenceParallelTrainerMixin": "hf_attn.distributed.trainer.SequenceParallelTrainerMixin",
    "distributed_attention": "hf_attn.distributed.functional.distributed_attention",
    "distributed_generate": "hf_attn.distributed.generation.distributed_generate",
    "sequence_parallel": "hf_attn.distributed.context.sequence_parallel",
    **{name: f"hf_attn.auto.{name}" for name in OWN_AUTO_CLASSES},
}

#: slug -> paper, in the order of the README table.
PAPERS: dict[str, Paper] = {paper.slug: paper for paper in _PAPERS}


def get_paper(slug: str) -> Paper:
    """Return the entry of a paper.

    Raises:
        ValueError: if there is no such slug; the message lists the ones that exist.
    """
    if slug not in PAPERS:
        raise ValueError(f"There is no paper {slug!r} in the catalogue. Available: {', '.join(PAPERS)}.")
    return PAPERS[slug]


def families() -> tuple[Family, ...]:
    """All registered families, in catalogue order."""
    return tuple(family for paper in _PAPERS for family in paper.families)


def paper_references(paper: Paper) -> dict[str, str]:
    """Name of each class of the families, and of each door of a paper -> `package.module.name`."""
    references = {}
    for family in paper.families:
        references[family.config] = family.config_reference
        references.update({name: family.model_reference(auto_class) for auto_class, name in family.models.items()})
        references.update({name: family.processor_reference(auto) for auto, name in family.processors.items()})
    references.update({name: f"hf_attn.{module}.{name}" for name, module in paper.doors.items()})
    return references


def public_names() -> dict[str, str]:
    """Everything that can be imported from `hf_attn` -> `package.module.name`."""
    names = dict(PACKAGE_DOORS)
    for paper in _PAPERS:
        names.update(paper_references(paper))
    return names


def find_family(model_type: str) -> tuple[Paper, Family]:
    """Return the paper and the family of a model type.

    Raises:
        ValueError: if no family has this model type.
    """
    for paper in _PAPERS:
        for family in paper.families:
            if family.model_type == model_type:
                return paper, family
    raise ValueError(
        f"There is no family with model type {model_type!r}. Available: "
        f"{', '.join(family.model_type for family in families())}."
    )
