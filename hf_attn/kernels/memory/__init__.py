"""Hash, fetch and weighted sum of memory layers (arXiv 2411.12992)."""

from .lookup import hash_chunks, lookup, plain_lookup


__all__ = ["hash_chunks", "lookup", "plain_lookup"]
