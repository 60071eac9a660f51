"""Looks for words in a row that the bundled calibration texts share with the texts on which pruned models are measured.

    python benchmarks/overlap.py [--instructions FILE] [--words 10]

Prints, for each bundled kind and each measured text, how many of its runs of that many words also stand in the other,
and one of them; of conversations also how many ask the very same question. Novels and speeches share set phrases.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from lab.texts import records, texts

from saap.data.texts import KINDS, Purpose, bundled_conversations, bundled_text, read_documents

Run = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.lower())


def runs(text: str, length: int) -> set[Run]:
    """All runs of that many words."""
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def bundled_questions() -> set[Run]:
    """What the bundled conversations ask."""
    return {tuple(words(messages[0]["content"])) for messages in bundled_conversations(Purpose.CALIBRATION)}


def questions(file: Path) -> set[Run]:
    """What the records of a file of instructions ask, as many as are measured."""
    return {tuple(words(row["instruction"] + " " + row.get("input", ""))) for row in records(file)}


def main() -> None:
    """Compare every bundled kind with every measured text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--words", type=int, default=10)
    given = parser.parse_args()
    named = {} if given.instructions is None else {"instructions": str(given.instructions)}
    with tempfile.TemporaryDirectory() as temporary:
        measured = {
            name: runs("\n\n".join(read_documents(file)), given.words)
            for name, file in texts(named, Path(temporary)).items()
        }
    for kind in KINDS:
        own = runs(bundled_text(kind, Purpose.CALIBRATION), given.words)
        for name, other in measured.items():
            shared = own & other
            print(f"{kind} / {name}: {len(shared)} of {len(own)}", f"({' '.join(min(shared))})" if shared else "")
    if given.instructions is not None:
        print(f"same questions: {len(bundled_questions() & questions(given.instructions))}")


if __name__ == "__main__":
    main()
