"""Settings of vocabulary pruning: how many tokens stay, and for which languages."""

from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from saap.settings.setting import Commas, Different, Flag, Parameters

vocabulary_flag = partial(Flag, panel="Vocabulary")


class Language(StrEnum):
    """A language, or a kind of text with words of its own, that saap has texts in."""

    ENGLISH = "en"
    FRENCH = "fr"
    GERMAN = "de"
    SPANISH = "es"
    CHINESE = "zh"
    CODE = "code"
    MATHEMATICS = "math"


def _languages(given: Any) -> Any:
    """Languages by code or by name. Raises ValueError for an unknown one, with near names."""
    names = {one.name.lower(): one for one in Language} | {str(one): one for one in Language}
    found = []
    for one in given if isinstance(given, (list, tuple)) else (given,):
        language = names.get(str(one).strip().lower())
        if language is None:
            near = get_close_matches(str(one).lower(), names, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"has {one!r}, which saap has no texts in",
                f"{hint}It takes {', '.join(Language)}; give a text in any other language with --calibration FILE",
            )
        found.append(language)
    return tuple(found)


VocabularySize = Annotated[Parameters | None, vocabulary_flag("Tokens to keep, e.g. 64k.", metavar="N")]
VocabularyRatio = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | None, vocabulary_flag("Fraction of the tokens to remove, e.g. 0.5.")
]
Coverage = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None,
    vocabulary_flag("Keep as many tokens as make up this fraction of a text, e.g. 0.999."),
]
Languages = Annotated[
    tuple[Language, ...],
    Different,
    BeforeValidator(_languages),
    Commas,
    vocabulary_flag(
        "Languages whose tokens stay: " + ", ".join(Language) + ".",
        metavar="L[,L...]",
        default="those that the model predicts well",
    ),
]
