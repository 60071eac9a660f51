"""What a structure means for modules: masks, norms, linear modules, least squares."""
