"""Structures applied to modules: masks, cuts, linear modules, least squares."""
