"""`saap recover`: from a pruned checkpoint to a fine-tuned one."""
