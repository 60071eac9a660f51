"""What pruning costs, and what its results cost to run."""
