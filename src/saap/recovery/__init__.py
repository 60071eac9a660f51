"""Group-wise quantised fine-tuning: what pruning took from the model is learned back in little memory."""
