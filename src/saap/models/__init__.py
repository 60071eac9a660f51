"""Loading, saving and walking models: devices, checkpoints, blocks, linear modules."""
