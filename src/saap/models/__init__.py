"""Models of transformers: opening, walking, structure and checkpoints."""
