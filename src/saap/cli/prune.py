"""`saap prune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from saap.cli.flags import Model
from saap.core.errors import ConfigurationError
from saap.settings.presets import Preset
from saap.settings.prune import PruneConfig
from saap.settings.recover import RecoverConfig
from saap.settings.registry import Consumer, Method
from saap.settings.run import Display, RunOptions, output_flag
from saap.settings.setting import Commas, Different, Flag, Positive, Settings, Texts

if TYPE_CHECKING:
    from saap.pipeline.prune.result import PruneReport
    from saap.pipeline.recover.result import RecoverReport
    from saap.pipeline.shared.progress import Reporter

Report = TypeVar("Report", "PruneReport", "RecoverReport")
recovery_flag = partial(Flag, panel="Recovery")
INSTRUCTIONS = ("conversations",)
"""Training data of `--preset paper`: the bundled instructions with answers."""


class Stages(Settings):
    """Stages that `saap prune` runs."""

    recover: Annotated[
        Texts,
        recovery_flag(
            "Then tune the result on this data, as `saap recover` does; repeatable.",
            default="conversations with --preset paper",
        ),
    ] = ()
    recover_minutes: Annotated[Positive | None, recovery_flag("Minutes of tuning.", default="20")] = None
    check: Annotated[
        tuple[Consumer, ...],
        Commas,
        Different,
        output_flag(
            "Then open the result in these programs, and say so in its model card.",
            metavar="NAME[,NAME...]",
        ),
    ] = ()
    dry_run: Annotated[bool, output_flag("Write nothing; print the forecast of time, memory and disk.")] = False


def prune(model: Model, config: PruneConfig, stages: Stages, options: RunOptions, display: Display) -> None:
    """Prune MODEL: discover its structures, estimate their importance, search, cut, reconstruct, check, write.

    Give exactly one target. Several processes (torchrun --nproc-per-node N -m saap prune ...) share the text; each has
    the whole model. With a GGUF file as MODEL, --roles expert -o NAME.gguf copies what stays byte for byte.
    """
    if options.out is None and not stages.dry_run:
        raise ConfigurationError("--output-dir is missing", "Specify the folder to write with -o DIR, or use --dry-run")
    papers = config.preset is Preset.PAPER and config.method is Method.SAAP
    writes_file = options.out is not None and options.out.suffix == ".gguf"
    limits = {"--max-memory": options.max_memory, "--device-map": options.device_map}
    untuned = "-o NAME.gguf" if writes_file else next((flag for flag, given in limits.items() if given is not None), "")
    data = stages.recover or (INSTRUCTIONS if papers and not untuned else ())
    if stages.recover_minutes is not None and not data:
        raise ConfigurationError("--recover-minutes tunes nothing", "Specify the data with --recover NAME|FILE")
    if stages.check and writes_file:
        raise ConfigurationError("--check opens folders, not GGUF files", "Leave it out, or write a folder with -o DIR")
    for consumer in stages.check:
        consumer.check()
    tuning = RecoverConfig(data=data, max_minutes=stages.recover_minutes, bos=config.bos) if data else None
    from saap.cli.show import output
    from saap.cli.show import prune as drawn

    with output.make_reporter(display) as reporter:
        if papers and not data:
            reporter.note(f"{untuned} leaves out the recovery of --preset paper: use `saap recover` later")
        if stages.dry_run:
            from saap.pipeline.prune.run import preview

            if tuning is not None:
                from saap.pipeline.prune.with_recovery import check_recovery

                check_recovery(model, config, tuning, options)
            shown = {**preview(model, config, options, reporter), "recover": list(data)}
            display, draw = display.model_copy(update={"quiet": False}), partial(drawn.print_preview, shown)
        elif tuning is None:
            from saap.pipeline.prune.run import run_prune

            results = run_prune(model, config, options, reporter)
            reports = [_checked(result.report, stages, reporter) for result in results]
            shown = _alone([one.as_dict() for one in reports])
            draw = partial(drawn.print_results, reports)
        else:
            from saap.pipeline.prune.with_recovery import prune_and_recover

            both = prune_and_recover(model, config, tuning, options, reporter)
            pairs = [(pruned, _checked(tuned, stages, reporter)) for pruned, tuned in both]
            shown = _alone([{"pruned": pruned.as_dict(), "recovered": tuned.as_dict()} for pruned, tuned in pairs])
            draw = partial(drawn.print_all_stages, pairs)
    # The last state of the progress is drawn over the lines before it, so the results come after it.
    output.show(display, shown, draw)


def _checked(report: Report, stages: Stages, reporter: Reporter) -> Report:
    """The report of a result that was opened in the programs of `--check`."""
    from saap.models.walk.processes import Processes
    from saap.pipeline.export.check import check_in_consumers

    if not stages.check or not Processes.found().first:
        return report
    return report.model_copy(update={"opened": check_in_consumers(Path(str(report.path)), stages.check, reporter)})


def _alone(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return reports[0] if len(reports) == 1 else {"results": reports}
