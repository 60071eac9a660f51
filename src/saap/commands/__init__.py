"""Commands that have a module of their own; `saap.cli` registers them."""
