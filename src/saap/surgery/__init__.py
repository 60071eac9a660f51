"""Cutting what a plan removes, and least-squares reconstruction of what remains."""
