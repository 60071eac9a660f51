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
    """Raise ConfigurationError for a device map that is unknown, or does not go with another option."""
    places = spread_over(source) if isinstance(source, nn.Module) else None
    if processes.count > 1 and (options.device_map is not None or places is not None):
        raise ConfigurationError(
            f"Blocks cannot lie on several devices, since each of {processes.count} processes holds the whole model",
            "Start it without torchrun or accelerate launch, or leave the device map out",
        )
    if options.device_map is None:
        return
    check_known(options.device_map)
    reason, remedy = "", "Leave one of the two out"
    if isinstance(source, nn.Module):
        reason, remedy = "the model is in memory already", "Load it with that device_map, or give its folder"
    elif options.device != "auto":
        reason = "--device names one device"
    elif options.max_memory is not None:
        reason = "--max-memory leaves the weights in their files"
    if reason:
        raise ConfigurationError(f"--device-map cannot be used, since {reason}", remedy)


def shared_work(processes: Processes, path: Path | None) -> WorkFolder:
    """The same work folder in all processes; the first one makes it, and a temporary one where `path` is None."""
    made = WorkFolder(path) if processes.first else None
    where = processes.broadcast_result(lambda: None if made is None else made.path)
    return made if made is not None else WorkFolder(where)


def shared_result(run: Run, target: Target) -> PruneResult | None:
    """The target's result in each process, if an interrupted run had already put it in its place."""
    there = run.processes.broadcast_result(lambda: finished_report(run.work, target) is not None)
    return find_finished(run, target) if there else None


def finish_together(run: Run, target: Target, made: Made, scores: ImportanceScores, dense: Behaviour) -> PruneResult:
    """Measure and place the result; the others open what the first has placed. In memory each has it already."""
    if target.folder is None:
        return finish(run, target, made, scores, dense)
    if run.processes.first:
        result = finish(run, target, made, scores, dense)
        run.processes.barrier()
        return result
    made.model = None
    run.processes.barrier()
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
    processes.broadcast_result(work.lock)
    try:
        yield
    finally:
        work.unlock()
