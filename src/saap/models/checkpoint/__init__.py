"""Checkpoint files, and the code that opens pruned ones."""
