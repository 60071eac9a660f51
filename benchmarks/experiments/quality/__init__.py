"""Experiments on the quality of pruned models."""
