"""`saap compare`: several methods at several ratios."""
