"""Block-wise execution of a model, wherever its weights and activations are."""
