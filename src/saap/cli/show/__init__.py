"""Output of the commands: progress and tables."""
