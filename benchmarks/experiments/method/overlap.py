"""Overlap of word n-grams between the bundled calibration texts and the evaluation texts."""

import re
import tempfile
from pathlib import Path

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.texts import INSTRUCTIONS, records, texts

from saap.data.texts import KINDS, Purpose, bundled_conversations, bundled_text, read_documents

LENGTH = 10
CELLS = list(KINDS)
OPTIONS = INSTRUCTIONS
SETTINGS = {"words in a row": LENGTH}
DECIDED_BY = ("data",)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + LENGTH]) for start in range(len(found) - LENGTH + 1)}


def measure(request: Request, wanted: Names) -> Measured:
    """Number of shared n-grams of each bundled and each evaluation text; for conversations also equal questions."""
    with tempfile.TemporaryDirectory() as temporary:
        named = texts(request.given, Path(temporary))
        measured = {name: runs("\n\n".join(read_documents(file))) for name, file in named.items()}
    for kind in wanted:
        own = runs(bundled_text(kind, Purpose.CALIBRATION))
        found = {"runs": len(own), "shared": {name: len(own & other) for name, other in measured.items()}}
        if kind == "conversations" and "instructions" in request.given:
            asked = {tuple(words(chat[0]["content"])) for chat in bundled_conversations(Purpose.CALIBRATION)}
            rows = records(Path(request.given["instructions"]))
            theirs = {tuple(words(f"{row['instruction']} {row.get('input', '')}")) for row in rows}
            found["same_questions"] = len(asked & theirs)
        yield kind, found


def summarise(cells: Cells) -> Values:
    shared = sum(sum(cell["shared"].values()) for cell in cells.values())
    return {"rows": cells, "runs": sum(cell["runs"] for cell in cells.values()), "shared": shared}
