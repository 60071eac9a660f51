"""Orchestration of each command: order of the stages, files, resuming and records. No mathematics."""
