"""The command line: one module for each command; flags in, one call, lines out."""
