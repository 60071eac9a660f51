"""`saap eval` and `saap generate`."""
