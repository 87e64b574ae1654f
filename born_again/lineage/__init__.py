"""A lineage: what was asked (spec), what happened (manifest), and the loop over generations (runner)."""
