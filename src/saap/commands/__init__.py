"""The commands, each in a module of its own: flags in, one call, lines out."""
