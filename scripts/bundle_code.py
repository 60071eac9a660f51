"""Build the bundled code texts from the sources of some packages.

    python scripts/bundle_code.py SOURCE_FOLDER

SOURCE_FOLDER holds the unpacked source archives of the packages below, each in a folder of its name and version
(`pip download --no-deps --no-binary :all: click==8.1.7`, `npm pack express@4.21.0`); Python's own modules come from the
Python that runs this, which has to be 3.11. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle_texts import head, write_bundled

LONGEST_PASSAGE = 4_800


@dataclass(frozen=True, slots=True)
class Passages:
    """The beginnings of some files of one package, each after its first `skipped` characters' line."""

    folder: str
    files: tuple[str, ...]
    skipped: int = 0
    length: int = LONGEST_PASSAGE


STANDARD_LIBRARY = ""
CALIBRATION = (
    Passages(
        STANDARD_LIBRARY,
        (
            "textwrap.py", "csv.py", "statistics.py", "difflib.py", "heapq.py", "fractions.py", "asyncio/queues.py",
            "http/cookies.py", "json/decoder.py", "dataclasses.py", "sched.py", "tempfile.py", "graphlib.py",
        ),
        skipped=600,
    ),
    Passages("click-8.1.7", ("src/click/parser.py", "src/click/formatting.py", "examples/repo/repo.py")),
    Passages("express-4.21.0/package", ("lib/response.js", "lib/utils.js")),
    Passages("axios-1.7.7/package", ("lib/core/AxiosHeaders.js", "lib/core/Axios.js")),
    Passages("lodash-4.17.21/package", ("debounce.js", "template.js", "_equalObjects.js", "_baseClone.js")),
    Passages("cffi-1.17.1", ("src/c/minibuffer.h", "src/c/cglob.c", "src/c/cdlopen.c")),
    Passages("pybind11-2.13.6/pybind11/include/pybind11", ("stl_bind.h", "iostream.h")),
    Passages("jpype1-1.5.1/native/java/org/jpype", ("manager/TypeManager.java", "html/Html.java"), skipped=900),
    Passages("bootstrap-5.3.3/package/scss", ("_offcanvas.scss",), length=3_000),
)  # fmt: skip
EVALUATION = (
    Passages(STANDARD_LIBRARY, ("shlex.py", "calendar.py"), skipped=600, length=4_500),
    Passages("axios-1.7.7/package", ("lib/utils.js",), skipped=600, length=2_500),
    Passages("cffi-1.17.1", ("src/c/file_emulator.h",), length=2_500),
    Passages("click-8.1.7", ("src/click/types.py",), skipped=600, length=3_500),
)


def passages(folder: Path, parts: Sequence[Passages]) -> str:
    """The text of all passages."""
    found = []
    for part in parts:
        root = folder / part.folder if part.folder else Path(sysconfig.get_path("stdlib"))
        for name in part.files:
            text = (root / name).read_text(encoding="utf-8")
            found.append(head(text[text.index("\n", part.skipped) + 1 :], part.length).strip("\n"))
    return "\n\n\n".join(found)


def main() -> None:
    """Write both texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the packages' sources")
    folder = parser.parse_args().source
    write_bundled("code", passages(folder, EVALUATION), passages(folder, CALIBRATION))


if __name__ == "__main__":
    main()
