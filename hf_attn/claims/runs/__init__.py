"""One module for each claim with a run, named after the slug of its paper; see [`hf_attn.claims`]."""
