"""The writing system of a token."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

NONE, PART = "none", "parts of characters"


def script_of(text: str) -> str:
    """The script of the first letter, by its Unicode name; `none` without letters.

    A text that is no whole character, as single bytes of one are, is of no script that could be told.
    """
    if "\ufffd" in text:
        return PART
    letter = next((letter for letter in text if letter.isalpha()), "")
    return unicodedata.name(letter, NONE).split()[0].lower() if letter else NONE


def by_script(texts: Iterable[str]) -> Counter[str]:
    """Number of tokens of each script."""
    return Counter(map(script_of, texts))
