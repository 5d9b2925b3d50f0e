"""The catalogue: one declarative entry for each paper, plain data, imported by everything and importing nothing heavy.

Registration, conversion, Hub stubs, PEFT defaults, the command line, the documentation and the test battery are all
driven by it. A class is named by the convention of the package: ``hf_attn.modeling.<folder>.<kind>_<folder>.<Class>``,
where the kind is ``configuration``, ``modeling`` or ``processing``. It is imported only when somebody needs it.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A configuration class with its models.

    Attributes:
        model_type: the key in ``config.json``.
        config: name of the configuration class.
        models: name of the Auto class -> name of the model class. A name that transformers does not have
            (``AutoModelForScanpathPrediction``) becomes an Auto class of this package.
        folder: folder in ``modeling/``; defaults to the model type.
        peft: PEFT defaults: the transformers model type whose target modules fit this family as well, or the names
            of the linear layers to adapt.
        processors: name of the Auto class (``AutoProcessor``, ``AutoImageProcessor``, ``AutoFeatureExtractor``,
            ``AutoTokenizer``) -> name of the class in ``processing_<folder>``.
        compares: fields that switch the mechanism of a causal language model on in ``hf-attn compare``; none, and it does
            not take part.
    """

    model_type: str
    config: str
    models: dict[str, str]
    folder: str = ""
    peft: str | tuple[str, ...] = ()
    processors: dict[str, str] = field(default_factory=dict)
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
    """A paper and what it has become here.

    Attributes:
        slug: short name, also of the paper's folder in ``modeling/`` and of its model card.
        title: title of the paper.
        arxiv: arXiv identifier.
        becomes: what the paper is turned into, in a few words.
        code: repository of the official code, empty if there is none.
        available: whether it can be used; everything else in the entry is empty until it can.
        families: configuration/model pairs.
        attention: names for ``attn_implementation``.
        converter: whether :func:`hf_attn.from_official` reads the official checkpoints.
        doors: public functions and classes of the paper, beside its families: name -> module below ``hf_attn``.
        extra: extra of the package that the paper needs.
        note: what a user has to know about the paper itself, such as a withdrawal.
    """

    slug: str
    title: str
    arxiv: str
    becomes: str
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


#: names for ``attn_implementation`` that split a sequence over processes
DISTRIBUTED_ATTENTION = tuple(
    f"distributed_{layout}" for layout in ("ring", "query", "key", "head", "ulysses", "grid", "zeppelin")
)

_PAPERS = (
    Paper(
        slug="sigmoid_attention",
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        arxiv="2409.04431",
        becomes="attention function with kernels; causal LM family for training from scratch",
        code="apple/ml-sigmoid-attention",
        available=True,
        families=(
            Family(
                model_type="sigmoid_attention",
                config="SigmoidAttentionConfig",
                models={"AutoModel": "SigmoidAttentionModel", "AutoModelForCausalLM": "SigmoidAttentionForCausalLM"},
                peft="llama",
                compares={},
            ),
        ),
        attention=("sigmoid", "sigmoid_eager", "sigmoid_torch", "sigmoid_triton"),
        converter=True,
    ),
    Paper(
        slug="sigma_reparam",
        title="Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        arxiv="2303.06296",
        becomes="reparametrised linear layers on any model, ViT family, entropy monitor",
        code="apple/ml-sigma-reparam",
        available=True,
        families=(
            Family(
                model_type="sigma_reparam_vit",
                config="SigmaReparamViTConfig",
                models={
                    "AutoModel": "SigmaReparamViTModel",
                    "AutoModelForImageClassification": "SigmaReparamViTForImageClassification",
                },
                folder="sigma_reparam",
                peft=("qkv", "o_proj"),
            ),
        ),
        converter=True,
        doors={
            "apply_sigma_reparam": "patching.sigma_reparam",
            "fold_sigma_reparam": "patching.sigma_reparam",
            "refresh_sigma_reparam": "patching.sigma_reparam",
            "bypassed_layers": "patching.sigma_reparam",
            "AttentionEntropyCallback": "analysis.entropy_callback",
        },
    ),
    Paper(
        slug="landmark",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        arxiv="2305.16300",
        becomes="Llama family with grouped-softmax attention, memory cache and retrieval at generation",
        code="epfml/landmark-attention",
        available=True,
        families=(
            Family(
                model_type="landmark",
                config="LandmarkConfig",
                models={"AutoModel": "LandmarkModel", "AutoModelForCausalLM": "LandmarkForCausalLM"},
                peft="llama",
                compares={"mem_freq": 15, "include_landmark_in_loss": False},
            ),
        ),
        attention=("landmark", "landmark_torch", "landmark_eager", "landmark_triton"),
        converter=True,
        doors={
            "passkey_test": "analysis.passkey",
            "plot_reading": "modeling.landmark.reading",
        },
    ),
    Paper(
        slug="echo_att",
        title="EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        arxiv="2409.14595",
        becomes="Llama-like family made from a base model, similarity analysis, two-stage distillation",
        available=True,
        families=(
            Family(
                model_type="echo_att",
                config="EchoAttConfig",
                models={"AutoModel": "EchoAttModel", "AutoModelForCausalLM": "EchoAttForCausalLM"},
                peft="llama",
                compares={"shared_layers": [2]},
            ),
        ),
        converter=True,
        doors={
            "attention_similarity": "analysis.similarity",
            "AttentionSimilarity": "analysis.similarity",
        },
    ),
    Paper(
        slug="deconstructing_attention",
        title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        arxiv="2510.11602",
        becomes="causal LM family with replaceable mixers, uniform or hybrid; indicators of attention maps",
        available=True,
        families=(
            Family(
                model_type="deconstructing_attention",
                config="DeconstructedConfig",
                models={"AutoModel": "DeconstructedModel", "AutoModelForCausalLM": "DeconstructedForCausalLM"},
                # those of Qwen2; a layer of kind `mlp` has the others
                peft=("q_proj", "v_proj", "self_attn.gate_proj", "self_attn.up_proj"),
                compares={},
            ),
        ),
        converter=True,
        doors={"attention_indicators": "analysis.indicators", "measure_attention": "analysis.indicators"},
    ),
    Paper(
        slug="memoryformer",
        title="MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers",
        arxiv="2411.12992",
        becomes="memory layer, also for pretrained models; causal LM family with hashed memory layers",
        code="C0-Design/MemoryFormer",
        available=True,
        families=(
            Family(
                model_type="memoryformer",
                config="MemoryFormerConfig",
                models={"AutoModel": "MemoryFormerModel", "AutoModelForCausalLM": "MemoryFormerForCausalLM"},
                # the only matrix; everything else is tables
                peft=("lm_head",),
                compares={"intermediate_size": None},
            ),
        ),
        converter=True,
        doors={
            "MemoryLayer": "architectures.memory_layer",
            "TableOptimizer": "training.memory_optimizer",
            "convert_linear": "patching.memory_layer",
        },
    ),
    Paper(
        slug="complexformer",
        title="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector "
        "Attention",
        arxiv="2505.10222",
        becomes="causal LM family, from scratch or from a Llama",
        code="shaojintian/complexFormer",
        available=True,
        families=(
            Family(
                model_type="complexformer",
                config="ComplexFormerConfig",
                models={"AutoModel": "ComplexFormerModel", "AutoModelForCausalLM": "ComplexFormerForCausalLM"},
                peft="llama",
                compares=True,
            ),
        ),
        converter=True,
        doors={"plot_head_angles": "modeling.complexformer.plots"},
        note="withdrawn from arXiv by its first author on 27 May 2025; no result of it is quoted here",
    ),
    Paper(
        slug="combiner",
        title="Combiner: Full Attention Transformer with Sparse Computation Cost",
        arxiv="2107.05768",
        becomes="attention functions (fixed, logsparse, axial) with a cache, causal and masked LM families",
        code="google-research/google-research",
        available=True,
        families=(
            Family(
                model_type="combiner",
                config="CombinerConfig",
                models={"AutoModel": "CombinerModel", "AutoModelForCausalLM": "CombinerForCausalLM"},
                peft="llama",
                compares=True,
            ),
            Family(
                model_type="combiner_encoder",
                config="CombinerEncoderConfig",
                models={"AutoModel": "CombinerEncoderModel", "AutoModelForMaskedLM": "CombinerForMaskedLM"},
                folder="combiner",
                peft="llama",
            ),
        ),
        attention=tuple(
            f"combiner_{kind}{suffix}"
            for kind in ("fixed", "logsparse", "vertical", "horizontal", "mixture", "rowmajor")
            for suffix in ("", "_eager", "_torch")
        ),
        converter=True,
        doors={"CombinerCache": "modeling.combiner.cache"},
    ),
    Paper(
        slug="wide_attention",
        title="Wide Attention Is The Way Forward For Transformers?",
        arxiv="2210.00640",
        becomes="sequence classification family with 10 attention types",
        available=True,
        families=(
            Family(
                model_type="wide_attention",
                config="WideTransformerConfig",
                models={
                    "AutoModel": "WideTransformerModel",
                    "AutoModelForSequenceClassification": "WideTransformerForSequenceClassification",
                    "AutoModelForDocumentMatching": "WideTransformerForDocumentMatching",
                },
                peft=("q_proj", "v_proj"),
            ),
        ),
        converter=True,
        doors={
            "aspect_ratio": "modeling.wide_attention.configuration_wide_attention",
            "byte_tokenizer": "modeling.wide_attention.tokenization",
            "attention_over_text": "modeling.wide_attention.plots",
            "plot_attention_over_text": "modeling.wide_attention.plots",
        },
    ),
    Paper(
        slug="unified_long_sequence",
        title="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
        arxiv="2302.06218",
        becomes="token-mixing template family, distributed multi-head attention",
    ),
    Paper(
        slug="zeppelin",
        title="Zeppelin: Balancing Variable-length Workloads in Data Parallel Large Model Training",
        arxiv="2509.21841",
        becomes="sequence partitioner, ring attention engine, remapping, simulator; Trainer mixin for any Llama-like model",
        available=True,
        attention=DISTRIBUTED_ATTENTION,
        doors={
            "ZeppelinCollator": "distributed.zeppelin.trainer",
            "ZeppelinEngine": "distributed.zeppelin.engine",
            "ZeppelinTrainerMixin": "distributed.zeppelin.trainer",
        },
    ),
    Paper(
        slug="deberta",
        title="DeBERTa: Decoding-enhanced BERT with Disentangled Attention",
        arxiv="2006.03654",
        becomes="enhanced mask decoder, SiFT, fast disentangled attention on existing checkpoints",
        code="microsoft/DeBERTa",
        available=True,
        families=(
            Family(
                model_type="deberta_emd",
                config="DebertaEMDConfig",
                models={"AutoModel": "DebertaEMDModel", "AutoModelForMaskedLM": "DebertaEMDForMaskedLM"},
                folder="deberta",
                peft=("query_proj", "key_proj", "value_proj"),
            ),
        ),
        converter=True,
        doors={
            "apply_fast_attention": "patching.deberta",
            "remove_fast_attention": "patching.deberta",
            "SiFTTrainerMixin": "training.sift",
            "DataCollatorForNGramMasking": "training.ngram_masking",
        },
    ),
    Paper(
        slug="pooling_attention",
        title="Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
        arxiv="2409.02727",
        becomes="embedding family with 5 designs, sentence-transformers module",
        code="yixuantt/PoolingAndAttn",
    ),
    Paper(
        slug="dementia_fusion",
        title="Context-Aware Attention Layers coupled with Optimal Transport Domain Adaptation and Multimodal Fusion "
        "methods for recognizing dementia from spontaneous speech",
        arxiv="2305.16406",
        becomes="audio and text classification family, processor, calibration",
    ),
    Paper(
        slug="tnt",
        title="Transformer in Transformer",
        arxiv="2103.00112",
        becomes="image family and single-stride backbone",
        code="huawei-noah/Efficient-AI-Backbones",
        available=True,
        families=(
            Family(
                model_type="tnt",
                config="TNTConfig",
                models={
                    "AutoModel": "TNTModel",
                    "AutoModelForImageClassification": "TNTForImageClassification",
                    "AutoBackbone": "TNTBackbone",
                },
                peft=("qk_proj", "v_proj"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="shvit",
        title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        arxiv="2401.16456",
        becomes="image family and backbone, fused inference form",
        code="ysj9909/SHViT",
        available=True,
        families=(
            Family(
                model_type="shvit",
                config="SHViTConfig",
                models={
                    "AutoModel": "SHViTModel",
                    "AutoModelForImageClassification": "SHViTForImageClassification",
                    "AutoBackbone": "SHViTBackbone",
                },
                peft=("qkv.conv", "proj.conv", "fc1.conv", "fc2.conv"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="biformer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        arxiv="2303.08810",
        becomes="image family and backbone, bi-level routing attention",
        code="rayleizhu/BiFormer",
        available=True,
        families=(
            Family(
                model_type="biformer",
                config="BiFormerConfig",
                models={
                    "AutoModel": "BiFormerModel",
                    "AutoModelForImageClassification": "BiFormerForImageClassification",
                    "AutoBackbone": "BiFormerBackbone",
                },
                peft=("qkv", "proj", "fc1", "fc2"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="rmt",
        title="RMT: Retentive Networks Meet Vision Transformers",
        arxiv="2309.11523",
        becomes="image family and backbone, Manhattan self-attention",
        code="qhfan/RMT",
        available=True,
        families=(
            Family(
                model_type="rmt",
                config="RMTConfig",
                models={
                    "AutoModel": "RMTModel",
                    "AutoModelForImageClassification": "RMTForImageClassification",
                    "AutoBackbone": "RMTBackbone",
                },
                peft=("q_proj", "v_proj"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="ninformer",
        title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        arxiv="2403.02411",
        becomes="image family",
        code="Abdullah-88/NiNformer",
        available=True,
        families=(
            Family(
                model_type="ninformer",
                config="NiNformerConfig",
                models={
                    "AutoModel": "NiNformerModel",
                    "AutoModelForImageClassification": "NiNformerForImageClassification",
                },
                peft=("proj", "fc1", "fc2"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="activator",
        title="Activator: GLU Activations as The Core Functions of a Vision Transformer",
        arxiv="2405.15953",
        becomes="image family",
        code="Abdullah-88/Activator",
        available=True,
        families=(
            Family(
                model_type="activator",
                config="ActivatorConfig",
                models={
                    "AutoModel": "ActivatorModel",
                    "AutoModelForImageClassification": "ActivatorForImageClassification",
                },
                peft=("proj_1", "proj_2", "proj_3", "fc1", "fc2"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="path_ensemble",
        title="Revisiting Vision Transformer from the View of Path Ensemble",
        arxiv="2308.06548",
        becomes="ViT family made from a base model: path pruning, EnsembleScale, self-distillation",
        available=True,
        families=(
            Family(
                model_type="path_ensemble",
                config="PathEnsembleConfig",
                models={
                    "AutoModel": "PathEnsembleModel",
                    "AutoModelForImageClassification": "PathEnsembleForImageClassification",
                },
                peft=("q_proj", "v_proj"),
            ),
        ),
        converter=True,
        doors={
            "path_scores": "analysis.path_scores",
            "PathScores": "analysis.path_scores",
        },
        extra="vision",
    ),
    Paper(
        slug="hat",
        title="HAT: Hybrid Attention Transformer for Image Restoration",
        arxiv="2309.05239",
        becomes="image restoration family and pipeline",
        code="XPixelGroup/HAT",
        available=True,
        families=(
            Family(
                model_type="hat",
                config="HATConfig",
                models={"AutoModel": "HATModel", "AutoModelForImageToImage": "HATForImageSuperResolution"},
                peft=("qkv", "proj"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="drct",
        title="DRCT: Saving Image Super-Resolution away from Information Bottleneck",
        arxiv="2404.00722",
        becomes="image restoration family and pipeline",
        code="ming053l/DRCT",
        available=True,
        families=(
            Family(
                model_type="drct",
                config="DRCTConfig",
                models={"AutoModel": "DRCTModel", "AutoModelForImageToImage": "DRCTForImageSuperResolution"},
                peft=("qkv", "proj"),
            ),
        ),
        converter=True,
        extra="vision",
    ),
    Paper(
        slug="clear",
        title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
        arxiv="2412.16112",
        becomes="attention processors for FLUX and SD3 of diffusers, distillation, high resolutions, several processes",
        code="Huage001/CLEAR",
        available=True,
        doors={
            "apply_clear": "patching.clear",
            "remove_clear": "patching.clear",
            "clear_parallel": "patching.clear.parallel",
            "load_clear_weights": "patching.clear.weights",
            "save_clear_weights": "patching.clear.weights",
            "generate_high_resolution": "patching.clear.high_resolution",
        },
        extra="diffusers",
    ),
    Paper(
        slug="sd_rpn",
        title="Catching the Details: Self-Distilled RoI Predictors for Fine-Grained MLLM Perception",
        arxiv="2509.16944",
        becomes="LLaVA and Qwen2.5-VL hooks, RoI predictor family, pseudo-labels, two-pass pipeline",
        code="YuHengsss/SD-RPN",
        available=True,
        families=(
            Family(
                model_type="sd_rpn",
                config="SdRpnConfig",
                models={"AutoModel": "SdRpnModel"},
                peft=("q_proj", "v_proj"),
            ),
        ),
        converter=True,
        doors={
            "SdRpnGenerator": "modeling.sd_rpn.generation",
        },
        extra="vision",
    ),
    Paper(
        slug="gman",
        title="GMAN: A Graph Multi-Attention Network for Traffic Prediction",
        arxiv="1911.08415",
        becomes="time-series family and forecasting pipeline",
        code="zhengchuanpan/GMAN",
        available=True,
        families=(
            Family(
                model_type="gman",
                config="GMANConfig",
                models={"AutoModel": "GMANModel", "AutoModelForTimeSeriesPrediction": "GMANForPrediction"},
                peft=("q_proj", "k_proj", "v_proj"),
            ),
        ),
        converter=True,
        extra="traffic",
    ),
    Paper(
        slug="oat",
        title="OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
        arxiv="2407.13335",
        becomes="scanpath family with generation, image processor, pipeline, metrics",
        code="HKUST-NISL/oat_eccv24",
        available=True,
        families=(
            Family(
                model_type="oat",
                config="OATConfig",
                models={
                    "AutoModel": "OATModel",
                    "AutoModelForScanpathPrediction": "OATForScanpathPrediction",
                },
                processors={"AutoImageProcessor": "OATImageProcessor"},
                peft=("q_proj", "v_proj"),
            ),
        ),
        converter=True,
        doors={"ScanpathMetrics": "analysis.scanpaths"},
        extra="vision",
    ),
    Paper(
        slug="random_feature_attention",
        title="What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
        arxiv="2307.11353",
        becomes="family and experiment script",
    ),
    Paper(
        slug="vit_analytics",
        title="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
        arxiv="2303.13731",
        becomes="analysis of ViTs with an interactive report, autoencoder family of attention patterns",
        available=True,
        families=(
            Family(
                model_type="vit_pattern_autoencoder",
                config="VitPatternAutoencoderConfig",
                models={"AutoModel": "VitPatternAutoencoder"},
                folder="vit_analytics",
                peft=("to_latent", "from_latent"),
            ),
        ),
        doors={
            "analyze_vit": "analysis.vit.analysis",
            "ViTAnalysis": "analysis.vit.results",
        },
        extra="analysis",
    ),
)


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
)

#: Auto class of this package (see :mod:`hf_attn.auto`) -> its task in words
OWN_AUTO_CLASSES: dict[str, str] = {
    "AutoModelForDocumentMatching": "document matching",
    "AutoModelForScanpathPrediction": "scanpath prediction",
}

#: what belongs to no paper: public name -> ``package.module.name``
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
        raise ValueError(f"No paper {slug!r} in the catalogue. Known: {', '.join(PAPERS)}.")
    return PAPERS[slug]


def families() -> tuple[Family, ...]:
    """All registered families, in catalogue order."""
    return tuple(family for paper in _PAPERS for family in paper.families)


def paper_references(paper: Paper) -> dict[str, str]:
    """Name of each class of the families, and of each door of a paper -> ``package.module.name``."""
    references = {}
    for family in paper.families:
        references[family.config] = family.config_reference
        references.update({name: family.model_reference(auto_class) for auto_class, name in family.models.items()})
        references.update({name: family.processor_reference(auto) for auto, name in family.processors.items()})
    references.update({name: f"hf_attn.{module}.{name}" for name, module in paper.doors.items()})
    return references


def public_names() -> dict[str, str]:
    """Everything that can be imported from ``hf_attn`` -> ``package.module.name``."""
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
        f"No family has model type {model_type!r}. Known: {', '.join(family.model_type for family in families())}."
    )
