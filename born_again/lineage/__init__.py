"""A lineage: what is to be trained (spec), what was trained (manifest), and the loop over generations (runner)."""
