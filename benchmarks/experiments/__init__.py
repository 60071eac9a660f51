"""The experiments, one module each, by what they ask about."""
