"""Papers on language: models, attention functions, training over several processes."""

from .entries import Family, Paper


_LAYOUTS = tuple(f"distributed_{layout}" for layout in ("ring", "query", "key", "head", "ulysses", "grid"))
_PLANNED = ("distributed_zeppelin",)

#: names for `attn_implementation` that split a sequence over processes
DISTRIBUTED_ATTENTION = (*_LAYOUTS, *_PLANNED)

PAPERS = (
    Paper(
        slug="sigmoid_attention",
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        arxiv="2409.04431",
        becomes="attention function with kernels; causal LM family for training from scratch",
        claim="Sigmoid attention with a bias of minus the logarithm of the length trains to the same loss as "
        "softmax attention.",
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
        attention=("sigmoid",),
        converter=True,
    ),
    Paper(
        slug="sigma_reparam",
        title="Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        arxiv="2303.06296",
        becomes="reparametrised linear layers on any model, ViT family, entropy monitor",
        claim="Dividing every weight by its spectral norm, times one learned scalar, keeps the entropy of attention "
        "from collapsing, so that training is stable at learning rates at which a plain transformer diverges.",
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
        claim="A model trained on short texts finds a fact in a text many times longer by fetching the few blocks "
        "whose landmark token it attends to.",
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
        attention=("landmark",),
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
        claim="Inner layers of a language model have similar attention maps, so they can share one map and be "
        "distilled with little loss of quality.",
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
        claim="Mixers that relax one design principle of attention are poor in every layer, but nearly as good as "
        "attention if they alternate with it; token mixing is indispensable.",
        available=True,
        families=(
            Family(
                model_type="deconstructing_attention",
                config="DeconstructedConfig",
                models={"AutoModel": "DeconstructedModel", "AutoModelForCausalLM": "DeconstructedForCausalLM"},
                # those of Qwen2; a layer of kind `mlp` has the others
                peft=("q_proj", "v_proj", "self_attn.gate_proj", "self_attn.up_proj"),
                compares={"placement": "hybrid"},
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
        claim="With hashed memory layers instead of fully connected ones, a language model of the same shape needs "
        "a fraction of the operations for a token, at the same quality.",
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
        claim="Attention whose heads weigh the angle of meaning against that of position learns better than rotary "
        "embeddings at equal size.",
        code="shaojintian/complexFormer",
        available=True,
        families=(
            Family(
                model_type="complexformer",
                config="ComplexFormerConfig",
                models={"AutoModel": "ComplexFormerModel", "AutoModelForCausalLM": "ComplexFormerForCausalLM"},
                peft="llama",
                compares={},
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
        claim="Combiner gives every token that may be seen a weight at a cost far below that of full attention, where sparse "
        "patterns leave most of them out.",
        code="google-research/google-research",
        available=True,
        families=(
            Family(
                model_type="combiner",
                config="CombinerConfig",
                models={"AutoModel": "CombinerModel", "AutoModelForCausalLM": "CombinerForCausalLM"},
                peft="llama",
                # the body of a Llama, so that only the attention is another
                compares={
                    "position_embedding_type": "rope",
                    "norm_type": "rms_norm",
                    "gated_mlp": True,
                    "lm_head_bias": False,
                },
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
            f"combiner_{kind}" for kind in ("fixed", "logsparse", "vertical", "horizontal", "mixture", "rowmajor")
        ),
        converter=True,
        doors={"CombinerCache": "modeling.combiner.cache"},
    ),
    Paper(
        slug="wide_attention",
        title="Wide Attention Is The Way Forward For Transformers?",
        arxiv="2210.00640",
        becomes="sequence classification family with 10 attention types",
        claim="One wide attention layer with as many heads as a deep stack is as accurate on text classification, "
        "smaller and faster.",
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
        becomes="14 token mixers by name, families with one; exact distributed attention",
        claim="Substitutes of attention cost less on long sequences, and what a longer context is worth depends on "
        "the task.",
        available=True,
        families=(
            Family(
                model_type="token_mixer",
                config="TokenMixerConfig",
                models={
                    "AutoModel": "TokenMixerModel",
                    "AutoModelForCausalLM": "TokenMixerForCausalLM",
                    "AutoModelForSequenceClassification": "TokenMixerForSequenceClassification",
                },
                folder="unified_long_sequence",
                peft=("q_proj", "k_proj", "v_proj", "o_proj"),
                compares={"mixer": "linear_elu", "num_attention_heads": 1, "num_key_value_heads": 1},
            ),
        ),
        attention=_LAYOUTS,
        converter=True,
        doors={"TokenMixer": "mixers"},
    ),
    Paper(
        slug="zeppelin",
        title="Zeppelin: Balancing Variable-length Workloads in Data Parallel Large Model Training",
        arxiv="2509.21841",
        becomes="sequence partitioner, ring attention engine, remapping, simulator; Trainer mixin for any Llama-like model",
        claim="Partitioning sequences of different lengths by cost, instead of splitting each one evenly over all "
        "processes, balances the work and makes training steps faster.",
        available=True,
        attention=_PLANNED,
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
        claim="Separate terms for content and position in attention, and absolute positions only at the end, help "
        "masked language modelling.",
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
        claim="No combination of pooling and attention is the best for every embedding task; pooling over layers "
        "with bidirectional attention is the best on similarity and retrieval.",
        code="yixuantt/PoolingAndAttn",
        available=True,
        families=(
            Family(
                model_type="pooling_attention",
                pipeline_tag="sentence-similarity",
                config="PoolingAttentionConfig",
                models={"AutoModel": "PoolingAttentionModel"},
                peft="llama",
            ),
        ),
        converter=True,
        doors={
            "contrastive_loss": "training.contrastive",
            "embedding_tokenizer": "modeling.pooling_attention.tokenization",
            "load_official_adapter": "modeling.pooling_attention.adapter",
        },
        extra="embeddings",
    ),
)
