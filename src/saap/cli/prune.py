"""`saap prune`."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

from saap.cli.flags import Model
from saap.core.errors import ConfigurationError
from saap.settings.prune import PruneConfig
from saap.settings.run import Display, RunOptions, output_flag
from saap.settings.setting import Flag, Names, Positive, Settings

if TYPE_CHECKING:
    from saap.pipeline.shared.progress import Reporter
    from saap.settings.recover import RecoverConfig


recovery_flag = partial(Flag, panel="Recovery")


class Stages(Settings):
    """Which stages `saap prune` carries out."""

    recover: Annotated[
        tuple[str, ...],
        Names,
        recovery_flag(
            "Then tune the result on this data, as `saap recover`; repeatable.", metavar="NAME|FILE", repeat=True
        ),
    ] = ()
    recover_minutes: Annotated[Positive | None, recovery_flag("Minutes of that tuning.", default="20")] = None
    dry_run: Annotated[bool, output_flag("Stop before the estimation; say what would be done.")] = False


def prune(model: Model, config: PruneConfig, stages: Stages, options: RunOptions, display: Display) -> None:
    """Prune MODEL: discover its structures, estimate their importance, search, cut, reconstruct, check, write.

    Give exactly one target. Several processes (torchrun --nproc-per-node N -m saap prune ...) share the text; each
    holds the whole model.
    """
    if options.out is None and not stages.dry_run:
        raise ConfigurationError("--output-dir is missing", "Name the folder to write with -o DIR, or use --dry-run")
    if stages.recover_minutes is not None and not stages.recover:
        raise ConfigurationError("--recover-minutes tunes nothing", "Name the data with --recover NAME|FILE")
    from saap.cli.show.output import make_reporter

    with make_reporter(quiet=display.quiet, to_stderr=display.as_json) as reporter:
        if stages.dry_run:
            _preview(model, config, options, reporter, as_json=display.as_json)
        elif stages.recover:
            from saap.settings.recover import RecoverConfig

            tuning = RecoverConfig(data=stages.recover, max_minutes=stages.recover_minutes, bos=config.bos)
            _prune_and_recover(model, config, tuning, options, reporter, display)
        else:
            prune_and_show(model, config, options, reporter, display)


def prune_and_show(model: str, config: PruneConfig, options: RunOptions, reporter: Reporter, display: Display) -> None:
    """Prune, and show what came out."""
    from saap.cli.show.output import print_results
    from saap.pipeline.prune.run import run_prune

    results = run_prune(model, config, options, reporter)
    if display.as_json:
        _print_json([result.report.as_dict() for result in results])
    elif not display.quiet:
        print_results(results)


def _preview(model: str, config: PruneConfig, options: RunOptions, reporter: Reporter, *, as_json: bool) -> None:
    from saap.cli.show.output import print_preview
    from saap.pipeline.prune.run import preview

    shown = preview(model, config, options, reporter)
    print(json.dumps(shown, indent=1)) if as_json else print_preview(shown)


def _prune_and_recover(
    model: str, config: PruneConfig, tuning: RecoverConfig, options: RunOptions, reporter: Reporter, display: Display
) -> None:
    from saap.cli.show.output import print_all_stages
    from saap.pipeline.prune.with_recovery import prune_and_recover

    results = prune_and_recover(model, config, tuning, options, reporter)
    if display.as_json:
        _print_json([{"pruned": pruned.as_dict(), "recovered": tuned.as_dict()} for pruned, tuned in results])
    elif not display.quiet:
        print_all_stages(results)


def _print_json(reports: list[dict[str, object]]) -> None:
    print(json.dumps(reports[0] if len(reports) == 1 else {"results": reports}, indent=1))
