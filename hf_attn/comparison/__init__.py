"""Comparison of the causal families of the catalogue and a plain Llama, trained with the same budget."""
