"""Fused kernels behind the attention functions of :mod:`hf_attn.attention`, one package a mechanism.

A kernel takes a :class:`hf_attn.kernels.call.AttentionCall`. Its check takes the same, and returns a
:class:`hf_attn.kernels.call.Refusal` or its result, which is passed to the kernel.
"""
