"""One module for each claim that can be run, named by the slug of its paper; see :mod:`hf_attn.claims`."""
