"""`saap prune`: from a model to its pruned checkpoint."""
