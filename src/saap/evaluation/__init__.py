"""Evaluation of models: perplexity, zero-shot tasks, generation and speed."""
