"""Hand-written pages with parts that come from the measured values, and pages that are all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import formats, front

from harness.experiment import Request
from harness.pages import Summaries, compact_svg, product_defaults, templates, write
from harness.store import ROOT

PAGES = ("README.md", "docs/machines.md")
WHOLE = {"findings.md.jinja": Path("docs/method/findings.md"), "formats.md.jinja": Path("docs/formats.md")}
"""Pages that are all of them, by template."""
CHART = Path("docs/front/quality.svg")
PART = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
COLOURS = (
    "<style>svg{color:#1f2328;background:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)
"""Ink and paper together, so that the chart is readable whatever surrounds it."""


def documents(summaries: Summaries, request: Request) -> dict[Path, str]:
    """The texts of all these files by their path."""
    values: dict[str, Any] = {
        "found": summaries, "front": front.front(request), "defaults": product_defaults(),
        "formats": formats.matrix(summaries),
    }  # fmt: skip
    found = {Path(name): filled((ROOT / name).read_text(encoding="utf-8"), values) for name in PAGES}
    found |= {path: templates().get_template(name).render(values).strip() + "\n" for name, path in WHOLE.items()}
    found[CHART] = chart(values["front"]["points"])
    return found


def filled(page: str, values: Mapping[str, Any]) -> str:
    """The page with each part between two marks replaced by the block of `front.md.jinja` with its name."""
    template = templates().get_template("front.md.jinja")

    def part(found: re.Match[str]) -> str:
        text = "".join(template.blocks[found[2]](template.new_context(dict(values))))
        return f"{found[1]}{text.strip()}\n{found[3]}"

    return PART.sub(part, page)


def chart(points: list[front.Point]) -> str:
    """The chart for light and dark pages.

    It has a digest of its points, as its drawing differs between versions of matplotlib.
    """
    head, _, body = compact_svg(front.quality(points), ink="currentColor").partition(">")
    return f"{head}>{COLOURS}<!-- points: {points_digest(points)} -->{body}"


def points_digest(points: list[front.Point]) -> str:
    return hashlib.sha256(repr(sorted(map(tuple, points))).encode()).hexdigest()[:12]


def write_documents(summaries: Summaries, request: Request) -> None:
    for path, text in documents(summaries, request).items():
        write(ROOT / path, text)
