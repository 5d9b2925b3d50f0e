"""Fused kernels behind the attention functions of [`hf_attn.attention`], one package a mechanism.

A kernel takes a [`hf_attn.kernels.call.AttentionCall`]. Its check takes the same, and returns a
[`hf_attn.kernels.call.Refusal`] or its result, which is passed to the kernel.
"""
