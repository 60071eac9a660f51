"""`saap recover`: fine-tuning of a pruned checkpoint."""
