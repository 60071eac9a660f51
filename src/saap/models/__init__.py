"""transformers models: loading, block-wise walks, structure and checkpoints."""
