"""Write the table of llama.cpp's architectures in docs/guides/export.md, from the data that the export uses.

    python scripts/gguf_table.py

tests/export shows for each row that llama.cpp computes the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "export.md"
BEGIN, END = "<!-- begin of the table of scripts/gguf_table.py -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """The table in Markdown."""
    from saap.export.gguf.architectures import ARCHITECTURES

    lines = ["| model type | architecture in llama.cpp | if layers differ |", "|---|---|---|"]
    for model_type, one in ARCHITECTURES.items():
        differ = "rejected" if one.per_layer is None else f"`{one.per_layer.name}`"
        if one.experts is not None:
            differ = "rejected; equal numbers and sizes of experts in all layers"
        if one.per_layer is not None and one.per_layer.tied:
            differ += ", if the output is tied to the embedding"
        lines.append(f"| {model_type} | `{one.name}` | {differ} |")
    return "\n".join(lines) + "\n"


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """The text with `new` between two markers."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def page(text: str) -> str:
    """The page with a new table."""
    return replaced(text, BEGIN, END, table())


def main() -> None:
    """Make the table anew."""
    sys.path[:0] = [str(ROOT / "src")]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
