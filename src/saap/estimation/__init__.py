"""How much each unit of each coupled group matters to the loss, sample by sample."""
