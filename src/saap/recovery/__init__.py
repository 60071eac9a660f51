"""Group-wise quantised fine-tuning: recovers the quality of a pruned model."""
