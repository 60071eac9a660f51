"""Pruned checkpoints on disk, and the code that opens them."""
