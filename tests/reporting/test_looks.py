"""How the methods of a comparison are told apart in its figures."""

from __future__ import annotations

from saap.reporting.comparison_figures import _look


def test_more_methods_than_colours_still_look_different() -> None:
    methods = [f"method {number}" for number in range(20)]
    looks = {tuple(_look(method, methods).values()) for method in methods}
    assert len(looks) == len(methods)
