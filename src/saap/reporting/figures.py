"""Figures, drawn by matplotlib for the page (SVG in the page's colours) and for files.

Their texts are in `words.jinja`, separate from measuring and drawing.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from saap.core.errors import EvaluationError, printable
from saap.reporting.tables import percent

INK = "#010203"
"""Placeholder for the text colour: replaced by `currentColor` in the page, by black in files."""
COLOURS = ("#3b76c4", "#d9742b", "#2f9e6e", "#b0529e", "#8a8f25", "#c94f4f", "#5aa7b8", "#7a5fc0", "#96744a", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Markers, since colour alone does not distinguish methods for all people."""
SIZE = (7.2, 3.4)
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "saap", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "figure.constrained_layout.use": True,
    "savefig.transparent": True, "axes.grid": True, "grid.color": "#88888844", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure. draw: draws onto a matplotlib axis, which then gets a legend if it has several labels.

    text: description for screen readers. name: of files and anchors; only its letters, digits and hyphens are kept.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Any], None]
    height: float = SIZE[1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", slug(self.name))

    @classmethod
    def of(
        cls, name: str, block: str, draw: Callable[[Any], None], said: Mapping[str, Any], *, rows: int = 0,
        height: float = SIZE[1],
    ) -> Figure:  # fmt: skip
        """A figure with the title and text of a template block, rendered with `said`.

        rows: of horizontal bars, for its height.
        """
        title, _, text = words(block, **said).partition(" || ")
        return cls(name=name, title=title, text=text, draw=draw, height=0.9 + 0.27 * rows if rows else height)


def slug(text: str) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters |= {"n": format, "percent": percent}
    return environment.from_string((resources.files("saap.reporting") / "words.jinja").read_text(encoding="utf-8"))


def words(block: str, **values: Any) -> str:
    """A block of the template as one line. The page does the escaping."""
    template = _template()
    return " ".join("".join(template.blocks[block](template.new_context(values))).split())


def require_matplotlib() -> None:
    """Raise EvaluationError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise EvaluationError("figures need matplotlib, which is not installed", "Run `pip install 'saap[report]'`")


@contextmanager
def _canvas(figure: Figure) -> Iterator[Any]:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(STYLE):
        canvas = Canvas(figsize=(SIZE[0], figure.height))
        axis = canvas.subplots()
        figure.draw(axis)
        _add_legend(axis)
        _make_printable(canvas)
        yield canvas


def _make_printable(canvas: Any) -> None:
    """Reduce labels to plain text: no formulas for powers of ten, no control characters."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, LogFormatterMathtext

    for text in canvas.findobj(Text):
        text.set_text(printable(text.get_text()))
    for scale in (scale for axis in canvas.axes for scale in (axis.xaxis, axis.yaxis)):
        if isinstance(scale.get_major_formatter(), LogFormatterMathtext):
            scale.set_major_formatter(LogFormatter())
        if isinstance(scale.get_minor_formatter(), LogFormatterMathtext):
            scale.set_minor_formatter(LogFormatter())


def to_svg(figure: Figure, *, ink: str = "currentColor") -> str:
    """The figure as an <svg> element with title and description for screen readers. ink: colour of its text."""
    content = io.StringIO()
    with _canvas(figure) as canvas:
        canvas.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, ink)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # ids are only unique inside one figure
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', lambda found: f"{found[1]}{figure.name}-", svg)
    head, _, body = svg.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{figure.name}-caption">{body}'


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Each figure as SVG and PNG. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        svg, png = (folder / f"{figure.name}.{ending}" for ending in ("svg", "png"))
        svg.write_text(to_svg(figure, ink="black"), encoding="utf-8")
        with _canvas(figure) as canvas:
            canvas.savefig(png, format="png", dpi=200, transparent=False, facecolor="white")
        paths += [svg, png]
    return paths


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Label horizontal bars or points at the left, from top to bottom."""
    axis.set_yticks(range(len(names)), list(map(printable, names)))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def label_bars(axis: Any, bars: Any, labels: Sequence[str]) -> None:
    """Label horizontal bars at their ends."""
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8.5)


def _add_legend(axis: Any) -> None:
    """A legend outside the plot: above if it is short, for narrow screens, else at the side."""
    labels = axis.get_legend_handles_labels()[1]
    if len(labels) < 2:
        return
    if len(labels) <= 4:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, borderaxespad=0.2, columnspacing=1.2)
    else:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, borderaxespad=0)


def plain_ticks(scale: Any, low: float, high: float) -> None:
    """Ticks like 1.5 and 20 on a logarithmic axis; matplotlib's powers of ten are too sparse here.

    scale: the xaxis or the yaxis of an axis. low, high: of the shown values.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    if high / low < 1.3:
        return
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 20 else (1, 3)
    places = [step * 10.0**power for power in range(-2, 8) for step in steps]
    scale.set_major_locator(FixedLocator([place for place in places if low * 0.9 <= place <= high * 1.1]))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    scale.set_minor_formatter(NullFormatter())
