"""Discovery of the coupled structures of a model by tracing its forward pass."""

from saap.discovery.discover import discover

__all__ = ["discover"]
