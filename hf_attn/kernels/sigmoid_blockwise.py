"""Blockwise sigmoid attention; to be replaced by the kernel."""


def sigmoid_attention_blockwise(query, key, value, **arguments):
    raise RuntimeError("not built yet")


def supports_blockwise(query, key, value, **arguments):
    return False, "it is not built yet"
