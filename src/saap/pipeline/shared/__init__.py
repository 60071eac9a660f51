"""What several commands need: inputs, memory, work folders, progress."""
