"""Shared code of all experiments: definition, cells on disk, driver, pages and charts."""
