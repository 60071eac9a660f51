"""All three stages of the paper at once: discovery, estimation and recovery."""

from __future__ import annotations

from pathlib import Path

from saap._version import __version__
from saap.core.errors import ConfigurationError
from saap.core.records import digest_of
from saap.data.training import TrainingData
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.processes import Processes
from saap.pipeline.prune.result import PruneReport
from saap.pipeline.prune.run import run_prune
from saap.pipeline.recover.context import GGUF_LATER, check_early, read_data
from saap.pipeline.recover.result import RecoverReport
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.digests import model_digest, named_files
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.progress import Reporter
from saap.pipeline.shared.targets import Target, finished_report, is_file, place_finished, plan_targets, work_path
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PruneConfig
from saap.settings.recover import RecoverConfig, check_alignment

PRUNED = "pruned.json"


def prune_and_recover(
    source: str | Path, pruning: PruneConfig, recovery: RecoverConfig, options: RunOptions, reporter: Reporter
) -> list[tuple[PruneReport, RecoverReport]]:
    """Prune and tune: both reports for each target.

    What the recovery would refuse is refused before anything is pruned. A run that was interrupted resumes after the
    last finished stage. Raises SaapError.
    """
    if options.out is None:
        raise ConfigurationError("--recover needs a folder", "Name it with -o DIR")
    resolved, data = check_recovery(source, pruning, recovery, options)
    processes = Processes.found()
    targets = plan_targets(pruning, options, source)
    processes.barrier()  # until all processes have checked the existing files
    work = WorkFolder(work_path(options))
    settings = [pruning.model_dump(mode="json"), recovery.model_dump(mode="json")]
    files = named_files(settings[0]) | named_files(settings[1])
    same = [settings, files, data.digest, str(source), options.revision, options.dtype, __version__]
    processes.broadcast_result(lambda: work.open(digest_of([*same, model_digest(resolved)])))
    recovery = shared_by(recovery, processes.count)
    with work.alone(processes):
        pruned = processes.broadcast_result(lambda: work.read_json(PRUNED))
        if pruned is None:
            into = _inside(options, work, "pruned")
            pruned = [result.report.as_dict() for result in run_prune(source, pruning, into, reporter)]
            processes.broadcast_result(lambda: work.write_json(PRUNED, pruned))
        # the teacher is MODEL, whose code may be run or not
        recovery = recovery.model_copy(update={"dense_trust_remote_code": options.trust_remote_code})
        tuned = []
        for target, saved in zip(targets, pruned, strict=True):
            into = _inside(options, work, f"tuned-{target.name}").model_copy(update={"revision": None})
            report = PruneReport.model_validate(saved)
            tuned.append((report, _tuned(target, str(report.path), recovery, into, work, processes, reporter)))
    processes.barrier()
    processes.broadcast_result(lambda: work.close(keep=options.keep_work))
    return tuned


def shared_by(recovery: RecoverConfig, processes: int) -> RecoverConfig:
    """The settings with a sequence for each process, unless the batch size was given."""
    given = "batch" in recovery.model_fields_set
    return recovery if given or processes == 1 else recovery.model_copy(update={"batch": processes})


def check_recovery(
    source: str | Path, pruning: PruneConfig, recovery: RecoverConfig, options: RunOptions
) -> tuple[ResolvedModel, TrainingData]:
    """The model and the training data, after all that can be refused of a recovery before the pruning.

    Raises SaapError.
    """
    if options.out is not None and is_file(options.out):
        raise ConfigurationError("--recover tunes weights, which a GGUF file does not take up", GGUF_LATER)
    for flag, given in (("--max-memory", options.max_memory), ("--device-map", options.device_map)):
        if given is not None:
            raise ConfigurationError(
                f"{flag} does not hold for the tuning of --recover",
                "Leave out one of them, and use `saap recover` later",
            )
    check_alignment(pruning.align, recovery)
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check_early(shared_by(recovery, Processes.found().count), resolved, options)
    return resolved, read_data(recovery, load_tokenizer(resolved))


def _tuned(
    target: Target, source: str, config: RecoverConfig, into: RunOptions, work: WorkFolder, processes: Processes,
    reporter: Reporter,
) -> RecoverReport:  # fmt: skip
    """Tune the pruned model of one target and put it in its place, unless it is there."""
    saved = processes.broadcast_result(lambda: finished_report(work, target))
    if saved is None:
        made = run_recover(source, config, into, reporter).report
        here, there = Path(str(into.out)), str(target.path)
        lines = [line.replace(str(here), there) for line in made.load_lines]
        saved = made.as_dict() | {"path": there, "load_lines": lines}
        processes.broadcast_result(lambda: place_finished(work, target, here, saved))
    return RecoverReport.model_validate(saved)


def _inside(options: RunOptions, work: WorkFolder, name: str) -> RunOptions:
    """The options of one stage: its result and its own stage files lie in the work folder, and go with that."""
    inside = {"out": work.file(name), "work_dir": work.file(f"{name}.stages"), "keep_work": True, "overwrite": True}
    return options.model_copy(update=inside)
