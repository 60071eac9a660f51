"""Export: checkpoint folders with model card and manifest, and the formats of other programs."""
