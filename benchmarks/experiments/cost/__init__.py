"""Experiments on the cost of pruning, and the speed and memory of its results."""
