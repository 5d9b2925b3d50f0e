"""Disentangled attention of DeBERTa (arXiv 2006.03654): content and relative position are scored apart."""
