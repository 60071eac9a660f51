"""Runtimes of speed measurements, one module each."""
