"""Hash, fetch and weighted sum of memory layers (arXiv 2411.12992)."""

from .lookup import gradient_of_tables, hash_chunks, lookup, plain_lookup


__all__ = ["gradient_of_tables", "hash_chunks", "lookup", "plain_lookup"]
