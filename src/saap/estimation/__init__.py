"""Importance of each unit of each coupled group for the loss, sample by sample."""
