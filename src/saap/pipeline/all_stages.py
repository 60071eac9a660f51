"""All three stages of the paper at once: discovery, estimation and recovery."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic import TypeAdapter

from saap.config import PruneConfig
from saap.data.training import training_data
from saap.errors import ConfigurationError
from saap.models.loading import load_tokenizer
from saap.models.processes import Processes
from saap.models.references import resolve_model
from saap.pipeline.inputs import RunOptions
from saap.pipeline.progress import Reporter
from saap.pipeline.recover import run_recover
from saap.pipeline.recovery_report import RecoverReport
from saap.pipeline.report import PruneReport
from saap.pipeline.run import run_prune
from saap.pipeline.targets import plan_targets
from saap.pipeline.work import WorkFolder
from saap.records import digest_of
from saap.recovery_config import RecoverConfig

PRUNED = "pruned"


def prune_and_recover(
    source: str | Path, pruning: PruneConfig, recovery: RecoverConfig, options: RunOptions, reporter: Reporter
) -> list[tuple[PruneReport, RecoverReport]]:
    """Prune and tune: both reports for each target.

    What the recovery would refuse is refused before anything is pruned. A run that was interrupted goes on from the
    last finished stage. Raises SaapError.
    """
    if options.out is None:
        raise ConfigurationError("--recover needs a folder", "Name it with --out DIR")
    if options.max_memory is not None:
        raise ConfigurationError(
            "--max-memory does not hold for the tuning of --recover",
            "Leave out one of them, and use `saap recover` later",
        )
    processes = Processes.found()
    targets = plan_targets(pruning, options)
    check_recovery(source, pruning, recovery, options)
    processes.wait()  # until nobody looks any more at what is there
    stages = WorkFolder(options.out.with_name(options.out.name + ".saap-stages"))
    settings = [pruning.model_dump(mode="json"), recovery.model_dump(mode="json"), str(source), options.dtype]
    processes.from_first(lambda: stages.open(digest_of(settings)))
    pruned_folder = stages.file(PRUNED)
    saved = processes.from_first(lambda: stages.read_json("pruned.json"))
    if saved is None:
        into = dataclasses.replace(options, out=pruned_folder, work_dir=None, overwrite=True)
        made = [result.report.as_dict() for result in run_prune(source, pruning, into, reporter)]
        processes.from_first(lambda: stages.write_json("pruned.json", made))
        saved = made
    reports = TypeAdapter(list[PruneReport]).validate_python(saved)
    recovery = recovery.model_copy(update={"dense_trust_remote_code": options.trust_remote_code})  # it is MODEL
    results = []
    for report, target in zip(reports, targets, strict=True):
        into = dataclasses.replace(options, out=target.folder, revision=None)
        results.append((report, run_recover(str(report.path), recovery, into, reporter).report))
    processes.wait()
    processes.from_first(lambda: stages.close(keep=options.keep_work))
    return results


def check_recovery(source: str | Path, pruning: PruneConfig, recovery: RecoverConfig, options: RunOptions) -> None:
    """Refuse now what the recovery of what `pruning` makes would refuse later. Raises SaapError."""
    if pruning.align % recovery.group_size:
        raise ConfigurationError(
            f"--align {pruning.align} gives sizes that groups of {recovery.group_size} do not divide",
            f"Use --align {recovery.group_size} or a multiple of it",
        )
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    training_data(
        recovery.data, load_tokenizer(resolved), length=recovery.length, held=recovery.validation_samples,
        seed=recovery.seed,
    )  # fmt: skip
