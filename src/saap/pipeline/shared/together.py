"""What several processes of one run do with its files: the first one writes, the others wait and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from saap.core.errors import ConfigurationError, VerificationError
from saap.core.records import ImportanceScores
from saap.models.loading.devices import check_known, pick_device, spread_over
from saap.models.walk.processes import Processes
from saap.pipeline.prune.finish import Made, find_finished, finish
from saap.pipeline.prune.result import PruneResult
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.outcome import Behaviour
from saap.pipeline.shared.targets import Target, finished_report
from saap.pipeline.shared.work import WorkFolder


def with_device_of(processes: Processes, source: str | Path | nn.Module, options: RunOptions) -> RunOptions:
    """The options with the device of this process, unless the model lies somewhere already."""
    if processes.count == 1 or isinstance(source, nn.Module):
        return options
    return options.model_copy(update={"device": str(processes.device(pick_device(options.device)))})


def check_device_map(options: RunOptions, source: str | Path | nn.Module, processes: Processes) -> None:
    """Raise ConfigurationError for a device map that is unknown, or that something else speaks against."""
    places = spread_over(source) if isinstance(source, nn.Module) else None
    if processes.count > 1 and (options.device_map is not None or places is not None):
        raise ConfigurationError(
            f"Blocks cannot lie on several devices, since each of {processes.count} processes holds the whole model",
            "Start it without torchrun or accelerate launch, or leave the device map out",
        )
    if options.device_map is None:
        return
    check_known(options.device_map)
    against = {
        "the model is in memory already": (
            isinstance(source, nn.Module),
            "Load it with that device_map, or give its folder",
        ),
        "--device names one device": (options.device != "auto", "Leave one of the two out"),
        "--max-memory leaves the weights in their files": (options.max_memory is not None, "Leave one of the two out"),
    }
    for reason, (given, remedy) in against.items():
        if given:
            raise ConfigurationError(f"--device-map cannot be used, since {reason}", remedy)


def shared_work(processes: Processes, path: Path | None) -> WorkFolder:
    """The same work folder in all processes; one without a name of its own is made by the first."""
    if processes.count == 1:
        return WorkFolder(path)
    made = WorkFolder(path) if processes.first else None
    where = processes.from_first(lambda: path if made is None else made.path)
    return made if made is not None else WorkFolder(where)


def shared_result(run: Run, target: Target) -> PruneResult | None:
    """The target's result in each process, if an interrupted run had already put it in its place."""
    there = run.processes.from_first(lambda: finished_report(run.work, target) is not None)
    return find_finished(run, target) if there else None


def finish_together(run: Run, target: Target, made: Made, scores: ImportanceScores, dense: Behaviour) -> PruneResult:
    """Measure and place the result; the others open what the first has placed. In memory each has it already."""
    if target.folder is None:
        return finish(run, target, made, scores, dense)
    if run.processes.first:
        result = finish(run, target, made, scores, dense)
        run.processes.wait()
        return result
    made.model = None
    run.processes.wait()
    opened = find_finished(run, target)
    if opened is None:
        raise VerificationError(
            f"{target.folder} has not been seen by process {run.processes.rank}",
            "Let all processes work on one file system",
        )
    return opened


@contextmanager
def alone_in(work: WorkFolder, processes: Processes) -> Iterator[None]:
    """While it lasts, no other run works in the folder. Raises OutputError in all processes if one does already."""
    processes.from_first(work.lock)
    try:
        yield
    finally:
        work.unlock()
