"""Fused kernels behind the attention functions."""
