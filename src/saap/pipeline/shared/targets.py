"""Targets: the requested results, checked before the expensive work."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saap.core.errors import ConfigurationError
from saap.core.records import ModelGraph
from saap.core.storage import PlanDocument
from saap.export.placing import (
    check_file,
    check_output,
    check_place,
    check_records,
    check_source_stays,
    place,
    place_file,
)
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.stages import PLACE
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PruneConfig
from saap.structure_search.budget import AnyBudget, Budget, budget_for_bytes, budget_for_parameters, budget_for_ratio

_OUTSIDE = "Choose a work folder outside the result"


@dataclass(frozen=True, slots=True)
class Target:
    """One requested result. name: of its stage files. budget: None if a plan is given.

    path: folder or GGUF file of the result, None to keep it in memory. plan: the given one, read after discovery.
    """

    name: str
    budget: AnyBudget | None
    path: Path | None
    plan: PlanDocument | None = None


def plan_targets(config: PruneConfig, options: RunOptions, source: Any = None, *, check: bool = True) -> list[Target]:
    """The targets with their paths, without budgets.

    With several ratios, each has a subfolder of `out`, or a file with the ratio in its name. With `check`, raises
    OutputError for a result that exists (unless `overwrite`), cannot be written, or would replace the source.
    """
    names = [f"{ratio:g}" for ratio in config.pruning_ratios] or ["target"]
    out, path = options.out, work_path(options)
    targets = [Target(name, None, _path_of(out, name) if out is not None and len(names) > 1 else out) for name in names]
    for target in targets:
        if path is not None and target.path is not None:
            _require_apart(path, target.path)
            check_work_outside(path, target.path)
        done = path is not None and path.is_dir() and finished_report(WorkFolder(path), target) is not None
        if not check or target.path is None or done:
            continue
        if isinstance(source, (str, Path)):
            for made in (target.path, records_of(target.path)):
                check_source_stays(source, made)
        if is_file(target.path):
            check_file(target.path, 0, overwrite=options.overwrite)
            check_records(records_of(target.path), overwrite=options.overwrite)
        else:
            check_output(target.path, 0, overwrite=options.overwrite)
    return targets


def is_file(path: Path) -> bool:
    """Whether a result at this path is a GGUF file, not a folder."""
    return path.suffix == ".gguf"


def records_of(path: Path) -> Path:
    """Folder with plan, scores and manifest of a result: `saap` in its folder, or NAME.saap next to its file."""
    return path.with_suffix(".saap") if is_file(path) else path / "saap"


def _path_of(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}{out.suffix}") if is_file(out) else out / name


def place_finished(work: WorkFolder, target: Target, made: Path, report: Mapping[str, Any]) -> None:
    """Move a complete result from `made` to the target's path, and record that just before.

    Raises OutputError if that fails; a folder still exists at `made` then.
    """
    if target.path is None:
        return
    work.write_json(PLACE.file_of(target.name), {"manifest": _manifest_digest(made), "report": report})
    if is_file(target.path):
        place_file(made, target.path)
        place(records_of(made), records_of(target.path))
    else:
        place(made, target.path)


def finished_report(work: WorkFolder, target: Target) -> dict[str, Any] | None:
    """The report of a result that an interrupted run had already moved, None if there is none."""
    record = work.read_json(PLACE.file_of(target.name))
    if not isinstance(record, dict) or target.path is None or not target.path.exists():
        return None
    there = _manifest_digest(target.path)
    return record.get("report") if there is not None and there == record.get("manifest") else None


def _manifest_digest(path: Path) -> str | None:
    file = records_of(path) / "manifest.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def with_budgets(targets: Sequence[Target], config: PruneConfig, graph: ModelGraph, dtype: torch.dtype) -> list[Target]:
    """The targets with the parameters to be removed. dtype: of the written weights. Raises TargetError."""
    budgets: list[Budget | None] = [None] * len(targets)
    if config.pruning_ratios:
        budgets = [budget_for_ratio(graph, ratio) for ratio in config.pruning_ratios]
    elif config.target_parameters is not None:
        budgets = [budget_for_parameters(graph, config.target_parameters)]
    elif config.target_bytes is not None:
        budgets = [budget_for_bytes(graph, config.target_bytes, dtype.itemsize)]
    return [dataclasses.replace(one, budget=budget) for one, budget in zip(targets, budgets, strict=True)]


def work_path(options: RunOptions) -> Path | None:
    """Folder of the stage files, by default next to the output; None if nothing is written.

    Raises ConfigurationError if the result would lie in it: it is deleted after success.
    """
    if options.work_dir is not None:
        if options.out is not None:
            _require_apart(options.work_dir, options.out)
        return options.work_dir
    if options.out is None:
        return None
    return options.out.with_name(options.out.name + ".saap-work")


def check_space(options: RunOptions, results: Sequence[int], others: int = 0, place: Path | None = None) -> None:
    """Raise OutputError unless the disks can hold the bytes of all results, and `others` in the work folder.

    Each result lies in the work folder until it is moved. place: in that folder, of what is written there first.
    """
    work = work_path(options)
    if work is None or options.out is None:
        return
    flag, place = "-o" if options.work_dir is None else "--work-dir", place or work
    if _disk_of(place) == _disk_of(options.out):
        check_place(place, others + sum(results), flag)
    else:
        check_place(place, others + max(results, default=0), flag)
        check_place(options.out, sum(results))


def _disk_of(path: Path) -> int:
    """The disk that a file at this path would lie on."""
    return next(folder for folder in path.absolute().parents if folder.exists()).stat().st_dev


def _require_apart(work: Path, out: Path) -> None:
    """Raise ConfigurationError if a result at `out`, or its records, would lie in the work folder."""
    for made in (out, records_of(out)):
        if made.resolve().is_relative_to(work.resolve()):
            raise ConfigurationError(f"--work-dir {work} would contain {made}, and is deleted after success", _OUTSIDE)


def check_work_outside(work: Path | None, result: Path | None) -> None:
    """Raise ConfigurationError if the work folder would lie in a result or its records, which are replaced."""
    if work is None or result is None:
        return
    for made in (result, records_of(result)):
        if work.resolve().is_relative_to(made.resolve()):
            raise ConfigurationError(f"--work-dir {work} would be in {made}, which the result replaces", _OUTSIDE)
