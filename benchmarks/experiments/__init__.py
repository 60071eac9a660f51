"""The experiments, one module each, by topic."""
