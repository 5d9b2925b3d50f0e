"""Small experiments that measure the claims of the papers, the files that they write, and the pages made from these files.

The claim itself is one sentence in the catalogue. Its run is the module named after the paper's slug in
[`hf_attn.claims.runs`], with three functions:

- `measure(work) -> dict`: the measurements, as JSON values. Long computations are parts (`work.part`), so that a run that was
  stopped can be resumed. With `work.miniature` the experiment takes only seconds, for tests.
- `conclude(data) -> Conclusion`: figures, verdict and reason, from these measurements alone, by the rule that the module's
  docstring states.
- `draw(data, figure)`: the figure.
"""
