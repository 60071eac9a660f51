"""Experiments on the method and its parts."""
