"""Writing results: the checkpoint folder with its card and manifest."""
