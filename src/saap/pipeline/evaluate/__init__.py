"""`saap eval`, `saap generate` and `saap chat`."""
