"""The order of the stages, for each command; files, resuming and records. No maths."""
