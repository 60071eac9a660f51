"""The tables of README.md, each between two marks of its own."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"


def write_between_marks(name: str, text: str) -> None:
    """Put `text` between the marks of the table `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = README.read_text().partition(begin)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")
