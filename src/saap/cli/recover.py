"""`saap recover`."""

from __future__ import annotations

from typing import Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.recover import RecoverConfig
from saap.settings.run import OPENS, Display, RunOptions
from saap.settings.setting import Only


def recover(
    model: Annotated[str, Argument("Folder written by `saap prune`, or any other model.")],
    config: RecoverConfig,
    options: Annotated[RunOptions, Only(("out", "overwrite", "work_dir", "keep_work", *OPENS))],
    display: Display,
) -> None:
    """Tune MODEL on text with quantised weights in little memory; write a plain checkpoint.

    Several processes (torchrun --nproc-per-node N -m saap recover ...) share each batch. Each has the whole quantised
    model and its teacher; with --shard each has a part of them.
    """
    if options.out is None:
        raise ConfigurationError("--output-dir is missing", "Specify the folder to write with -o DIR")
    from saap.cli.show.output import make_reporter, show
    from saap.cli.show.recover import print_recovery
    from saap.pipeline.recover.run import run_recover

    with make_reporter(display) as reporter:
        report = run_recover(model, config, options, reporter).report
    show(display, report.as_dict(), lambda: print_recovery(report))
