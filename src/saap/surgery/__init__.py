"""Cutting what a plan does not keep, and restoring what remains."""
