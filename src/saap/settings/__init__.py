"""The settings of every command: names, types, defaults, bounds and help."""
