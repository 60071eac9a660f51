"""How the methods of a comparison are told apart in its figures."""

from __future__ import annotations

from typing import Any

from saap.reporting.comparison_figures import look
from saap.reporting.figures import Figure, to_svg


def test_more_methods_than_colours_still_look_different() -> None:
    methods = [f"method {number}" for number in range(20)]
    looks = {tuple(look(method, methods).values()) for method in methods}
    assert len(looks) == len(methods)


def test_powers_of_ten_are_plain_text() -> None:
    def draw(axis: Any) -> None:
        axis.plot([1e-4, 1, 100], [1, 20, 300])
        axis.set(xscale="log", yscale="log")

    svg = to_svg(Figure(name="powers", title="Powers", text="Powers of ten.", draw=draw))
    assert ">100</text>" in svg
    assert "$" not in svg
