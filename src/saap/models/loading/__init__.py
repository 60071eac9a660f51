"""From what a user types to a model on a device."""
