"""Charts shared by several experiments; their titles and texts are in the templates."""

from collections.abc import Mapping, Sequence
from typing import Any

from saap.reporting.figures import COLOURS, MARKERS, Figure, plain_ticks

Line = tuple[Sequence[float], Sequence[float]]


def lines(name: str, series: Mapping[str, Line], *, x: str, y: str, log: str = "", ticks: bool = False) -> Figure:
    """Lines with markers. series: x and y values by label. log: logarithmic axes, e.g. "xy".

    ticks: label the measured x values themselves.
    """

    def draw(axis: Any) -> None:
        for index, (label, (places, values)) in enumerate(series.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axis.plot(places, values, color=colour, marker=marker, label=label)
        axis.set_xscale("log" if "x" in log else "linear")
        if "y" in log:
            axis.set_yscale("log")
            shown = [value for _, values in series.values() for value in values]
            plain_ticks(axis.yaxis, min(shown), max(shown))
        if ticks:
            measured = sorted({place for at, _ in series.values() for place in at})
            axis.set_xticks(measured, [f"{place:g}" for place in measured])
            axis.minorticks_off()
        axis.set(xlabel=x, ylabel=y)

    return Figure(name=name, title="", text="", draw=draw)


def bars(
    name: str, values: Mapping[str, Sequence[float]], labels: Sequence[str], *, x: str,
    errors: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:  # fmt: skip
    """Grouped horizontal bars. values: by label, one for each name of `labels`; errors: their intervals."""
    height = 0.8 / len(values)

    def draw(axis: Any) -> None:
        places = range(len(labels))
        for index, (label, lengths) in enumerate(values.items()):
            at = [place + (index - (len(values) - 1) / 2) * height for place in places]
            axis.barh(at, lengths, height=height * 0.9, color=COLOURS[index % len(COLOURS)], label=label)
            for place, length, (low, high) in zip(at, lengths, (errors or {}).get(label, ()), strict=False):
                axis.plot([min(low, length), max(high, length)], [place, place], color="#555555", linewidth=1)
        axis.set_yticks(list(places), list(labels))
        axis.invert_yaxis()
        axis.set_xlabel(x)

    tall = 1.0 + 0.32 * len(labels) * max(1, len(values) / 2)
    return Figure(name=name, title="", text="", draw=draw, height=tall)
