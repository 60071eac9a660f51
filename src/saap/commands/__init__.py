"""The commands, one module each: plain functions whose signature is the command line."""
