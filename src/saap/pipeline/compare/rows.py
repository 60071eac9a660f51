"""Rows of a comparison on disk: existing rows, finished rows, and their settings."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap._version import __version__
from saap.core.errors import OutputError, StaleInputError
from saap.core.evaluation_records import ComparedModel, ComparisonRow, DenseRow
from saap.core.records import ModelGraph, digest_of
from saap.core.storage import write_whole
from saap.evaluation.zero_shot import local_file
from saap.pipeline.shared.digests import named_files
from saap.pipeline.shared.work import WorkFolder
from saap.settings.compare import CompareRequest
from saap.settings.evaluate import EvalRequest
from saap.settings.prune import MethodChoice

REMEDY = "Choose another -o for this comparison"
# Evaluation settings that affect only the tasks, which may be run later than the perplexities.
_OF_TASKS = ("tasks", "task_data", "limit", "rounded")

RowKey = tuple[MethodChoice, float, bool]
"""A method, a pruning ratio, and whether the result was reconstructed."""


@dataclass(frozen=True, slots=True)
class RowStore:
    """Finished rows of one comparison in `folder`, which may also have rows of other methods, ratios and seeds."""

    folder: Path
    request: CompareRequest

    def open(self, graph: ModelGraph) -> None:
        """Create the folder, or resume in a folder with the same settings and texts.

        Raises StaleInputError if its rows have other settings or files of the comparison or the tasks, OutputError if
        the folder contains anything else.
        """
        config = self.request.config.model_dump(mode="json", exclude={"pruning_ratios", "seed", "method"})
        evaluation = self.request.evaluation
        defaults = {name: EvalRequest.model_fields[name].default for name in _OF_TASKS}
        texts = {name: str(value) for name, value in evaluation.model_copy(update=defaults).model_dump().items()}
        files = named_files({**config, "texts": evaluation.texts})
        try:
            settings = [__version__, config, texts, graph.model.digest, *([files] if files else [])]
            WorkFolder(self.folder).open(digest_of(settings))
        except (OutputError, StaleInputError) as error:
            raise type(error)(error.offender, REMEDY) from None
        there, requested = self.dense(), _task_settings(evaluation)
        found = None if there is None else there.asked
        if found and evaluation.tasks and found != requested:
            raise StaleInputError(
                f"{self.folder} has results of other tasks ({_described(found)}; this run has {_described(requested)})",
                REMEDY,
            )

    def dense(self) -> DenseRow | None:
        """The row of the dense model; None if there is none."""
        file = self._file("dense")
        return DenseRow.model_validate_json(file.read_bytes()) if file.exists() else None

    def write_dense(self, row: DenseRow) -> DenseRow:
        """Keep the row of the dense model, and the settings of its tasks."""
        row = row.model_copy(update={"asked": _task_settings(self.request.evaluation) if row.tasks else None})
        self.write(self._file("dense"), row)
        return row

    def write(self, path: Path, row: ComparedModel) -> None:
        """Keep a row."""
        write_whole(path, (row.model_dump_json(indent=1) + "\n").encode())

    def lacking(self, seed: int) -> dict[RowKey, Path]:
        """The requested rows of `seed` that are missing or lack their tasks, with their files."""
        return {
            key: path
            for key, path in self._requested(seed).items()
            if not path.exists() or (self.request.asks_tasks(key[1]) and not _read(path).tasks)
        }

    def finished(self) -> tuple[ComparisonRow, ...]:
        """All existing rows, requested ones first."""
        requested = [path for seed in self.request.seeds for path in self._requested(seed).values()]
        others = sorted(set((self.folder / "rows").glob("*.json")) - {*requested, self._file("dense")})
        return tuple(map(_read, [*requested, *others]))

    def _requested(self, seed: int) -> dict[RowKey, Path]:
        request = self.request
        keys = itertools.product(request.methods, request.config.pruning_ratios, request.restorations)
        return {
            key: self._file(f"{file_name(key[0].label)}-{key[1]:g}-{'restored' if key[2] else 'cut'}-seed{seed}")
            for key in keys
        }

    def _file(self, name: str) -> Path:
        return self.folder / "rows" / f"{name}.json"


def _read(path: Path) -> ComparisonRow:
    return ComparisonRow.model_validate_json(path.read_bytes())


def _task_settings(evaluation: EvalRequest) -> dict[str, Any]:
    """Settings of the tasks of an evaluation; local files by their content, not their path."""
    folder, digest = evaluation.task_data, None
    if folder is not None:
        files = [local_file(folder, task) for task in evaluation.tasks]
        digest = digest_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    return {
        "tasks": list(evaluation.tasks), "local": folder is not None, "files": digest, "limit": evaluation.limit,
        "rounded": evaluation.rounded,
    }  # fmt: skip


def _described(settings: Mapping[str, Any]) -> str:
    of_each = f"the first {settings['limit']} questions" if settings["limit"] else "all questions"
    rounded = ", rounded" if settings["rounded"] else ""
    return f"{', '.join(settings['tasks'])} from {'files' if settings['local'] else 'the hub'}, {of_each}{rounded}"


def file_name(label: str) -> str:
    """A method's label as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", label)
