"""What a model does: perplexity."""
