"""Vocabulary pruning: which tokens stay, and the cut of tokenizer and model."""
