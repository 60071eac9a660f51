"""What pruned models are worth."""
