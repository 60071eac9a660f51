"""The file `saap/vocabulary.json` of a folder: which tokens of the dense model it has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from saap.core.errors import ModelError
from saap.core.storage import Count, Strict, faults_of, write_whole

VOCABULARY = "vocabulary.json"


class VocabularyMap(Strict):
    """The tokens of a model whose vocabulary was pruned.

    rows: of the dense model's embedding. old_ids: for each new id, that of the dense model, ascending.
    """

    format_version: Literal[1] = 1
    rows: Count
    old_ids: Annotated[tuple[Count, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        rising = all(low < high for low, high in zip(self.old_ids, self.old_ids[1:], strict=False))
        if not rising or self.old_ids[-1] >= self.rows:
            raise ValueError("old_ids are not ascending ids of the dense model")
        return self


def write_vocabulary(folder: Path, found: VocabularyMap) -> None:
    """Write the map into a folder written by saap. Raises OutputError."""
    write_whole(folder / "saap" / VOCABULARY, (found.model_dump_json() + "\n").encode())


def read_vocabulary(folder: Path) -> VocabularyMap | None:
    """Read the map of a folder, None if it has the dense model's tokens. Raises ModelError if it is damaged."""
    file = folder / "saap" / VOCABULARY
    try:
        return VocabularyMap.model_validate_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValidationError) as error:
        problem = f"{file} is not a map of a vocabulary ({faults_of(error)})"
        raise ModelError(problem, "Copy the file again from where the folder was written") from None
