"""`saap recover`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

from saap.core.errors import ConfigurationError
from saap.settings.recover import RecoverConfig
from saap.settings.run import OPENS, Display, RunOptions, output_flag
from saap.settings.setting import Only, Settings


class Preview(Settings):
    """What `saap recover` does instead of its work."""

    dry_run: Annotated[bool, output_flag("Try a few steps; print what the run would cost and gain.")] = False


def recover(
    model: Annotated[str, "Folder written by `saap prune`, or any other model."],
    config: RecoverConfig,
    preview: Preview,
    options: Annotated[RunOptions, Only(("out", "overwrite", "work_dir", "keep_work", *OPENS))],
    display: Display,
) -> None:
    """Tune MODEL on text, by default with quantised weights; write a plain checkpoint.

    Several processes (torchrun --nproc-per-node N -m saap recover ...) share each batch. Each has the whole quantised
    model and its teacher; with --shard each has a part of them.
    """
    if options.out is None and not preview.dry_run:
        raise ConfigurationError("--output-dir is missing", "Specify the folder to write with -o DIR, or use --dry-run")
    from saap.cli.show.output import make_reporter, show
    from saap.cli.show.recover import print_forecast, print_recovery

    with make_reporter(display) as reporter:
        if preview.dry_run:
            from saap.pipeline.recover.forecast import forecast

            found = forecast(model, config, options, reporter)
            display, shown = display.model_copy(update={"quiet": False}), asdict(found)
            draw = partial(print_forecast, found)
        else:
            from saap.pipeline.recover.run import run_recover

            report = run_recover(model, config, options, reporter).report
            shown, draw = report.as_dict(), partial(print_recovery, report)
    show(display, shown, draw)
