"""Shared parts of the commands: inputs, memory, work folders, progress."""
