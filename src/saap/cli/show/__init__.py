"""What the commands print: progress and tables."""
