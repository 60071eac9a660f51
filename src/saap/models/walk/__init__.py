"""Running a model block by block, wherever its weights and activations are."""
