"""The command line, one module per command: parse flags, make one call, print the result."""
