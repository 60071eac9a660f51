"""`saap run`: a whole run from one YAML file."""
