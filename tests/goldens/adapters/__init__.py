"""Adapters from golden cases to the public API: one module per paper, named after its slug, without mathematics.

A module has one function, `run(case) -> dict[str, torch.Tensor]`: expected array -> what this package computes. An array
computed in several ways is returned as `"name@way"`, and each is compared with `name`. It may have `NOT_EXPOSED`, a
dictionary from names (or shell patterns) of intermediates that our structure does not expose to the reason.
"""
