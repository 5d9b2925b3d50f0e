"""The files from which sentence-transformers loads a saved model. They name its own classes only, so nothing has to be trusted."""

import json
from pathlib import Path

from .configuration_pooling_attention import PoolingAttentionConfig


def write_modules(folder: str | Path, config: PoolingAttentionConfig) -> None:
    """Write `modules.json`, `sentence_bert_config.json` and `config_sentence_transformers.json`, each unless it exists."""
    text = {"method": "forward", "method_output_name": "pooler_output"}
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": text},
            "module_output_name": "sentence_embedding",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": "", **(config.prompts or {})},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = Path(folder, name)
        if not path.exists():
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
