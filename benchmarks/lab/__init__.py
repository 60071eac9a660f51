"""Tools of the experiments: models, texts, checkpoints, measures, and commands of saap."""
