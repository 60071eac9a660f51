"""Records on disk: the readable plan and the scores. Whole files or nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as tensors_to_bytes

from saap.core.errors import PlanError, StaleInputError
from saap.core.files import whole_file
from saap.core.records import (
    FloatArray,
    GroupScores,
    ImportanceScores,
    Layout,
    ModelGraph,
    StructurePlan,
)

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A count in a file, exact as a float too."""
Amount = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
"""A measured number in a file, small enough to be computed with."""
STATISTICS = tuple(field.name for field in fields(GroupScores))
_HEADER = ("graph_digest", "calibration_digest", "element_order", "aggregation")


class Strict(BaseModel):
    """A frozen record of a file; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises OutputError and leaves no partial file."""
    with whole_file(path) as part:
        part.write_bytes(content)


def faults_of(error: ValidationError | OSError) -> str:
    """Validation errors of a file in one line: the first five with their locations."""
    if isinstance(error, OSError):
        return str(error.strerror)
    found = error.errors(include_url=False, include_context=False, include_input=False)[:5]
    return "; ".join(f"{'.'.join(map(str, fault['loc']))[:100] or 'file'}: {fault['msg']}" for fault in found)


def write_scores(path: Path, scores: ImportanceScores) -> None:
    """Write all statistics as safetensors: `GROUP/STATISTIC` (units,) float64, and `losses` (samples,)."""
    tensors = {
        f"{name}/{statistic}": getattr(group, statistic)
        for name, group in scores.groups.items()
        for statistic in STATISTICS
    }
    tensors["losses"] = scores.losses
    metadata = {name: str(getattr(scores, name)) for name in ("samples", *_HEADER)}
    metadata["groups"] = json.dumps(list(scores.groups))
    write_whole(path, tensors_to_bytes({name: np.ascontiguousarray(one) for name, one in tensors.items()}, metadata))


def read_scores(path: Path) -> ImportanceScores:
    """Read what `write_scores` wrote. Raises StaleInputError if the file is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata()
            groups: dict[str, GroupScores] = {}
            for name in json.loads(header["groups"]):
                arrays = {statistic: _array(file, f"{name}/{statistic}") for statistic in STATISTICS}
                if {array.shape for array in arrays.values()} != {(len(arrays["vector"]),)}:
                    raise ValueError(f"the statistics of {name} are of different sizes")
                groups[name] = GroupScores(**arrays)
            if not 0 < int(header["samples"]) < 2**53:
                raise ValueError("its number of samples is impossible")
            return ImportanceScores(
                **{name: header[name] for name in _HEADER},
                samples=int(header["samples"]),
                losses=_array(file, "losses"),
                groups=groups,
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StaleInputError(f"{path} has no scores of this version ({error})", "Delete it") from None


def _array(file: Any, name: str) -> FloatArray:
    return np.asarray(file.get_tensor(name), dtype=np.float64)


class GroupEntry(Strict):
    """One group of a plan file: the number of kept units, and their indices as runs."""

    kept: Count | None = None
    of: Annotated[Count, Field(ge=1)] | None = None
    units: str | None = None

    def keep(self, total: int) -> tuple[int, ...] | int:
        """Kept unit indices of a group of `total` units, or only their number. Raises ValueError."""
        if self.of not in (None, total):
            raise ValueError(f"it has {total} units, not {self.of}")
        if self.units is not None:
            units = parse_units(self.units, total)
            if self.kept not in (None, len(units)):
                raise ValueError(
                    f"kept is {self.kept} but {len(units)} units are listed; correct one, or delete `units`"
                )
            return units
        if self.kept is None:
            raise ValueError("neither kept nor units is given")
        if self.kept > total:
            raise ValueError(f"kept {self.kept} of {total}")
        return self.kept


class TrailEntry(Strict):
    """One candidate of the search and its measured loss, None if that is not finite."""

    name: str
    loss: Amount | None


class PlanDocument(Strict):
    """Content of a plan.json, possibly edited by hand; a group not listed keeps all units."""

    format_version: Literal[1]
    graph_digest: str = ""
    layout: Layout = Layout.ADAPTIVE
    strategy: str = "edited"
    align: Annotated[int, Field(ge=1)] = 1
    parameters: Count | None = None
    block_parameters: Count | None = None
    dropped_blocks: Annotated[tuple[int, ...], AfterValidator(lambda blocks: tuple(sorted(set(blocks))))] = ()
    groups: dict[str, GroupEntry]
    trail: tuple[TrailEntry, ...] = ()

    def keep(self, graph: ModelGraph) -> dict[str, tuple[int, ...] | int]:
        """Kept unit indices of each listed group, or only their number if the scores are to choose the units.

        Raises ValueError with every fault: unknown groups, other sizes, units out of range or duplicated, a `kept` that
        disagrees with `units`.
        """
        units = {group.name: group.units for group in graph.groups}
        faults: list[str] = []
        keep: dict[str, tuple[int, ...] | int] = {}
        for name, entry in self.groups.items():
            try:
                if name not in units:
                    raise ValueError("the model has no such group")
                keep[name] = entry.keep(units[name])
            except ValueError as error:
                faults.append(f"{name}: {error}")
        faults += [f"no block {layer}" for layer in self.dropped_blocks if not 0 <= layer < len(graph.blocks)]
        if graph.blocks and set(range(len(graph.blocks))) <= set(self.dropped_blocks):
            faults.append("dropped_blocks: no block would be left")
        if faults:
            raise ValueError("; ".join(faults))
        return keep


def write_plan(path: Path, plan: StructurePlan, graph: ModelGraph) -> None:
    """Write the plan in readable and editable form: kept units of each group as runs, "0-3,5,7-12"."""
    document = PlanDocument(
        format_version=1,
        graph_digest=plan.graph_digest,
        layout=plan.layout,
        strategy=plan.strategy,
        align=plan.align,
        parameters=plan.parameters,
        block_parameters=plan.block_parameters,
        dropped_blocks=plan.dropped_blocks,
        groups={
            group.name: GroupEntry(kept=len(plan.kept(group)), of=group.units, units=format_units(plan.kept(group)))
            for group in graph.groups
            if group.layer not in plan.dropped_blocks
        },
        trail=tuple(
            TrailEntry(name=candidate.name, loss=candidate.loss if math.isfinite(candidate.loss) else None)
            for candidate in plan.trail
        ),
    )
    write_whole(path, (document.model_dump_json(indent=2) + "\n").encode())


def read_plan(path: Path, graph: ModelGraph | None = None) -> PlanDocument:
    """Read a plan, and check it against the model's groups if these are given. Raises PlanError with every fault."""
    try:
        document = PlanDocument.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"The plan {path} cannot be read ({error.strerror})", "Give the path of a plan.json") from None
    except ValidationError as error:
        raise PlanError(f"{path} is not a plan ({faults_of(error)})", "Correct these entries") from None
    if graph is not None:
        try:
            document.keep(graph)
        except ValueError as error:
            raise PlanError(f"{path} does not fit the model ({error})", "Correct these entries") from None
    return document


def format_units(units: Iterable[int]) -> str:
    """Ascending indices as runs: (0, 1, 2, 5) -> "0-2,5"."""
    found = np.fromiter(units, np.int64)
    runs = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if len(found) else []
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_units(text: str, count: int | None = None) -> tuple[int, ...]:
    """The indices that `format_units` wrote, below `count` if that is given.

    Raises ValueError on anything else, also on indices given twice.
    """
    units: list[int] = []
    for part in text.replace(" ", "").split(",") if text.strip() else []:
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part!r} is neither a unit nor a run of units such as 3-7")
        run = range(int(first), int(last or first) + 1)
        if not run or (units and run[0] <= units[-1]):
            raise ValueError(f"{part!r} does not follow in ascending order")
        if count is not None and run[-1] >= count:
            raise ValueError(f"unit {run[-1]} of {count}")
        units.extend(run)
    return tuple(units)
