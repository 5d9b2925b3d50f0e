"""Entries of the catalogue."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A configuration class with its models.

    Attributes:
        model_type: the key in `config.json`.
        config: name of the configuration class.
        models: name of the Auto class -> name of the model class. A name that transformers does not have
            (`AutoModelForScanpathPrediction`) becomes an Auto class of this package.
        folder: folder in `modeling/`; defaults to the model type.
        peft: PEFT defaults: the transformers model type whose target modules fit this family as well, or the names
            of the linear layers to adapt.
        processors: name of the Auto class (`AutoProcessor`, `AutoImageProcessor`, `AutoFeatureExtractor`,
            `AutoTokenizer`) -> name of the class in `processing_<folder>`.
        pipeline_tag: task of the Hub, where the Auto class does not say it.
        compares: fields that switch the mechanism of a causal language model on in `hf-attn compare`; without them the
            family is not compared.
    """

    model_type: str
    config: str
    models: dict[str, str]
    folder: str = ""
    peft: str | tuple[str, ...] = ()
    processors: dict[str, str] = field(default_factory=dict)
    pipeline_tag: str = ""
    compares: dict[str, object] | None = None

    def _reference(self, kind: str, name: str) -> str:
        folder = self.folder or self.model_type
        return f"hf_attn.modeling.{folder}.{kind}_{folder}.{name}"

    @property
    def config_reference(self) -> str:
        return self._reference("configuration", self.config)

    def model_reference(self, auto_class: str) -> str:
        return self._reference("modeling", self.models[auto_class])

    def processor_reference(self, auto_class: str) -> str:
        return self._reference("processing", self.processors[auto_class])


@dataclass(frozen=True)
class Paper:
    """A paper and its implementation.

    Attributes:
        slug: short name, also of the paper's folder in `modeling/` and of its model card.
        title: title of the paper.
        arxiv: arXiv identifier.
        becomes: the components made from the paper, in a few words.
        claim: what the paper claims, one sentence in our own words, of which `hf-attn claim` measures what a small machine can.
        code: repository of the official code, empty if there is none.
        available: whether it can be used; everything else in the entry is empty until it can.
        families: configuration/model pairs.
        attention: attention functions, by the name for `attn_implementation` that leaves the implementation open.
        converter: whether [`hf_attn.from_official`] reads the official checkpoints.
        doors: public functions and classes of the paper, beside its families: name -> module below `hf_attn`.
        extra: extra of the package that the paper needs.
        note: important facts about the paper itself, such as a withdrawal.
    """

    slug: str
    title: str
    arxiv: str
    becomes: str
    claim: str
    code: str = ""
    available: bool = False
    families: tuple[Family, ...] = ()
    attention: tuple[str, ...] = ()
    converter: bool = False
    doors: dict[str, str] = field(default_factory=dict)
    extra: str = ""
    note: str = ""

    @property
    def status(self) -> str:
        return "available" if self.available else "planned"

    @property
    def converter_module(self) -> str:
        return f"hf_attn.modeling.{self.slug}.convert_{self.slug}"


@dataclass(frozen=True)
class Task:
    """A task of `transformers.pipeline` that this package adds.

    Attributes:
        name: first argument of `pipeline`.
        pipeline: name of the pipeline class, in the module of `pipelines/` that has the task's name.
        auto_class: the Auto class that loads its models.
        type: kind of the input, as transformers has it: "text", "image", "audio", "video" or "multimodal".
        default_model: Hub id and revision of the model that is used if none is given.
    """

    name: str
    pipeline: str
    auto_class: str
    type: str
    default_model: tuple[str, str] | None = None

    @property
    def pipeline_reference(self) -> str:
        return f"hf_attn.pipelines.{self.name.replace('-', '_')}.{self.pipeline}"
