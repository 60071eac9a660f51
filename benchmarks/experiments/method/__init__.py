"""The method and its parts."""
