"""Loading of models: from the user's input to a model on a device."""
