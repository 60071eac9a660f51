"""Write docs/families.md: what every family of the conformance suite can do, found by doing it on tiny models.

    python scripts/family_table.py

Nothing is known beforehand: each cell is a result of tests/conformance/cases.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "families.md"


def main() -> None:
    """Make the table anew."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import transformers
    from tests.conformance.table import document

    transformers.utils.logging.disable_progress_bar()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(document(), encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
