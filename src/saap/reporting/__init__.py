"""Reports: figures, tables and pages of measured results, without any measurements."""
