"""Model card templates, one a paper, filled by `hf_attn.hub.model_card`."""
