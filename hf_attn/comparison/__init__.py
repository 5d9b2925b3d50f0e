"""The causal mechanisms of the catalogue and a plain Llama, trained under one budget and measured alike."""
