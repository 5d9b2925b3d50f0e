"""What the papers claim, shown in small: runs that measure a claim, the files that they write, and the pages made from those.

The sentence of a claim is in the catalogue. Its run is the module of the paper's slug in :mod:`hf_attn.claims.runs`, three
functions:

- ``measure(work) -> dict``: the measurements, as JSON values; what takes long is a ``work.part``, so that a run that was
  stopped goes on where it was. ``work.miniature`` asks for a size of seconds that tests run.
- ``conclude(data) -> Conclusion``: figures, verdict and reason, from these measurements alone, by the rule that the module's
  docstring states.
- ``draw(data, figure)``: the picture.
"""
