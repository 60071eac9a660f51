"""Coupled structures of a model, found by tracing its forward."""

from saap.discovery.discover import discover

__all__ = ["discover"]
