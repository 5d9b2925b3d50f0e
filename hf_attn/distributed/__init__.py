"""Sequence parallelism: exact attention in six layouts, and Zeppelin for sequences of different lengths.

Its modules are imported on first use.
"""

from importlib import import_module


_PUBLIC = {
    "LostRankError": "exchange",
    "SequenceParallelTrainerMixin": "trainer",
    "count_sent_bytes": "exchange",
    "distributed_attention": "functional",
    "distributed_generate": "generation",
    "sequence_parallel": "context",
    "shard": "context",
    "unshard": "context",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
