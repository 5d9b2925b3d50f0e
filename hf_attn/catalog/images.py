"""Papers on images: classifiers, restoration, diffusion."""

from .entries import Family, Paper


PAPERS = (
    Paper(
        slug="tnt",
        title="Transformer in Transformer",
        arxiv="2103.00112",
        becomes="image family and single-stride backbone",
        claim="An inner transformer over the pixels of each patch raises the accuracy of a ViT at about equal cost.",
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
        claim="Attention with a single head on a part of the channels, over few tokens, is several times faster "
        "than mobile vision transformers of the same accuracy.",
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
        claim="Attention of each region of a picture to its few most related regions costs far less at high "
        "resolutions than dense attention, and is more accurate than attention within windows.",
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
        claim="Attention that decays with the Manhattan distance between positions raises the accuracy of a vision "
        "transformer at equal cost.",
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
        claim="A gate that is computed by token mixing raises the accuracy of an image classifier over MLP-Mixer "
        "and ViT.",
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
        claim="Gated linear units in place of attention classify images better than a ViT of the same setting.",
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
        claim="A trained ViT is an ensemble of paths through its layers, and pruning its worst paths does not hurt "
        "the accuracy.",
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
        claim="Channel attention, window attention and overlapping cross-attention together use more of the input "
        "than SwinIR, and restore pictures better.",
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
        claim="Dense connections keep the intensity of features up along the depth, where that of SwinIR falls, and "
        "restore pictures better with fewer parameters.",
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
        claim="Attention of image tokens to a disc around them makes the cost of a diffusion transformer grow "
        "linearly with the number of pixels.",
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
)
