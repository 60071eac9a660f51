"""Figures, tables and the page that show what was measured; they measure nothing themselves."""
