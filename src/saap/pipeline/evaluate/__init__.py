"""`saap eval` and `saap generate`: what models do, measured."""
