"""Papers on several kinds of data at a time, on other kinds, and on looking into models."""

from .entries import Family, Paper


PAPERS = (
    Paper(
        slug="dementia_fusion",
        title="Context-Aware Attention Layers coupled with Optimal Transport Domain Adaptation and Multimodal Fusion "
        "methods for recognizing dementia from spontaneous speech",
        arxiv="2305.16406",
        becomes="audio and text classification family, processor, pipeline, optimal transport, calibration",
        claim="Fusing speech and transcript recognises dementia better than either alone, and label smoothing "
        "calibrates the probabilities.",
        available=True,
        families=(
            Family(
                model_type="dementia_fusion",
                config="DementiaFusionConfig",
                models={
                    "AutoModel": "DementiaFusionModel",
                    "AutoModelForAudioTextClassification": "DementiaFusionForClassification",
                },
                processors={
                    "AutoProcessor": "DementiaFusionProcessor",
                    "AutoFeatureExtractor": "SpeechImageFeatureExtractor",
                },
                # Those of the encoders; the layers behind them are new and train in full.
                peft=("query", "value", "q_proj", "v_proj"),
            ),
        ),
        converter=True,
        doors={
            "ClassificationMetrics": "analysis.calibration",
            "fit_temperature": "analysis.calibration",
            "plot_reliability": "analysis.calibration",
            "entropic_plan": "architectures.transport",
            "exact_plan": "architectures.transport",
        },
        extra="speech",
    ),
    Paper(
        slug="sd_rpn",
        title="Catching the Details: Self-Distilled RoI Predictors for Fine-Grained MLLM Perception",
        arxiv="2509.16944",
        becomes="LLaVA and Qwen2.5-VL hooks, RoI predictor family, pseudo-labels, two-pass pipeline",
        claim="A small head on the middle layers of a vision-language model finds the region that a question is "
        "about, and reading that region again answers questions about details better.",
        code="YuHengsss/SD-RPN",
        available=True,
        families=(
            Family(
                model_type="sd_rpn",
                pipeline_tag="image-text-to-text",
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
        claim="Attention over sensors and over time forecasts traffic better than simpler methods, the more so the "
        "farther ahead.",
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
        claim="A transformer over objects predicts in which order people look at them better than simpler orders do.",
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
        becomes="families fitted in closed form, kernels, scikit-learn estimator, experiment script",
        claim="A layer of random-feature attention learns functions of a query and an average over keys from far "
        "fewer samples than random features of all tokens at once.",
        available=True,
        families=(
            Family(
                model_type="random_feature_attention",
                pipeline_tag="tabular-regression",
                config="RandomFeatureAttentionConfig",
                models={"AutoModel": "RandomFeatureAttentionModel"},
            ),
            Family(
                model_type="random_feature_mlp",
                pipeline_tag="tabular-regression",
                config="RandomFeatureMLPConfig",
                models={"AutoModel": "RandomFeatureMLPModel"},
                folder="random_feature_attention",
            ),
        ),
        converter=True,
        doors={
            "RandomFeatureAttentionRegressor": "modeling.random_feature_attention.estimator",
            "infinite_head_kernel": "modeling.random_feature_attention.kernels",
        },
    ),
    Paper(
        slug="vit_analytics",
        title="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
        arxiv="2303.13731",
        becomes="analysis of ViTs with an interactive report, autoencoder family of attention patterns",
        claim="A few heads of a vision transformer carry its decisions, and pruning finds them.",
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
