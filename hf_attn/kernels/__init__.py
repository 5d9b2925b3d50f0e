"""Fused kernels behind the attention functions of :mod:`hf_attn.attention`.

Beside every kernel stands a check ``supports_<kernel>`` with the same arguments, which returns ``(ok, reason)``.
"""
