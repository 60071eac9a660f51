"""What a structure means for modules: masks, cuts, linear modules, least squares."""
