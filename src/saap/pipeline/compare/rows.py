"""The rows of a comparison on disk: which lie there, which are finished, and what they were made with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.core.errors import OutputError, StaleInputError
from saap.core.records import ModelGraph, digest_of
from saap.core.storage import write_whole
from saap.evaluation.zero_shot import local_file
from saap.pipeline.evaluate.run import finite
from saap.pipeline.shared.work import WorkFolder
from saap.settings.measure import CompareRequest, EvalRequest
from saap.settings.prune import MethodChoice

DENSE = "dense.json"
# Of the evaluation, what only the tasks depend on: they may be asked later than the perplexities were measured.
_OF_TASKS = ("tasks", "task_data", "limit", "rounded")

RowKey = tuple[MethodChoice, float, bool]
"""A method, a pruning ratio, and whether the result was restored."""


@dataclass(frozen=True, slots=True)
class RowStore:
    """Finished rows of one comparison in `folder`; those of other methods, ratios and seeds may lie beside them."""

    folder: Path
    request: CompareRequest

    def open(self, graph: ModelGraph) -> None:
        """Make the folder, or go on in one of the same settings.

        Raises StaleInputError if its rows were made with other settings or its tasks were asked otherwise, OutputError
        if it holds something else.
        """
        config = self.request.config.model_dump(mode="json", exclude={"pruning_ratios", "seed", "method"})
        evaluation = self.request.evaluation
        without_tasks = evaluation.model_copy(update={name: _default(name) for name in _OF_TASKS})
        texts = {name: str(value) for name, value in without_tasks.model_dump().items()}
        try:
            WorkFolder(self.folder).open(digest_of([config, texts, graph.digest]))
        except (OutputError, StaleInputError) as error:
            raise type(error)(error.offender, "Choose another --out for this comparison") from None
        asked, asking = (self.dense() or {}).get("asked"), task_settings(evaluation)
        if asked and evaluation.tasks and asked != asking:
            raise StaleInputError(
                f"{self.folder} holds answers to other tasks ({_described(asked)}; this run asks {_described(asking)})",
                "Choose another --out for this comparison",
            )

    def dense(self) -> dict[str, Any] | None:
        """The row of the dense model; None if it is not there, or without the requested tasks."""
        path = self.folder / "rows" / DENSE
        if not path.exists():
            return None
        row: dict[str, Any] = json.loads(path.read_text())
        return row if row["tasks"] or not self.request.evaluation.tasks else None

    def write_dense(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the row of the dense model, and how its tasks were asked. Returns it as it will be read again."""
        asked = task_settings(self.request.evaluation) if row["tasks"] else None
        path = self.folder / "rows" / DENSE
        self.write(path, {**row, "asked": asked})
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept

    def write(self, path: Path, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        write_whole(path, (json.dumps(finite(dict(row)), indent=1) + "\n").encode())

    def lacking(self, seed: int) -> dict[RowKey, Path]:
        """The requested rows of `seed` that are not there, with the files that they belong in."""
        return {key: path for key, path in self._wanted(seed).items() if not self._is_finished(path, key[1])}

    def finished(self) -> list[dict[str, Any]]:
        """All rows that are there, requested ones first."""
        asked = [path for seed in self.request.seeds for path in self._wanted(seed).values()]
        others = sorted(set((self.folder / "rows").glob("*.json")) - {*asked, self.folder / "rows" / DENSE})
        return [json.loads(path.read_text()) for path in (*asked, *others)]

    def _wanted(self, seed: int) -> dict[RowKey, Path]:
        return {
            (choice, ratio, restored): self.folder / "rows" / f"{_key(choice.label, ratio, seed, restored)}.json"
            for choice in self.request.methods
            for ratio in self.request.config.pruning_ratios
            for restored in self.request.restorations
        }

    def _is_finished(self, path: Path, ratio: float) -> bool:
        """Whether a row is there, with its tasks if it is to have them."""
        return path.exists() and (not self.request.asks_tasks(ratio) or bool(json.loads(path.read_text())["tasks"]))


def task_settings(evaluation: EvalRequest) -> dict[str, Any]:
    """How the tasks of an evaluation are asked: of local files their content, not where they lie."""
    local = evaluation.task_data is not None
    return {
        "tasks": list(evaluation.tasks),
        "local": local,
        "files": _content(evaluation) if local else None,
        "limit": evaluation.limit,
        "rounded": evaluation.rounded,
    }


def _content(evaluation: EvalRequest) -> str:
    """Digest of the local files that the tasks are read from."""
    folder = evaluation.task_data
    files = [local_file(folder, task) for task in evaluation.tasks] if folder is not None else []
    return digest_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _described(asked: Mapping[str, Any]) -> str:
    of_each = f"the first {asked['limit']} questions" if asked["limit"] else "all questions"
    return (
        f"{', '.join(asked['tasks'])} from {'files' if asked['local'] else 'the hub'}, {of_each}"
        f"{', rounded' if asked['rounded'] else ''}"
    )


def _default(name: str) -> Any:
    return EvalRequest.model_fields[name].default


def _key(label: str, ratio: float, seed: int, restored: bool) -> str:
    return f"{file_name(label)}-{ratio:g}-{'restored' if restored else 'cut'}-seed{seed}"


def file_name(label: str) -> str:
    """A method's label as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", label)
