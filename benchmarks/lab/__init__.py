"""What experiments work with: models, texts, checkpoints, measures, and commands of saap."""
