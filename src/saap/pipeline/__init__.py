"""A run from a model to its pruned checkpoint; `run` knows the order of the stages."""
