"""`saap recover`."""

from __future__ import annotations

import json
from typing import Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.recover import RecoverConfig
from saap.settings.run import OPENS, Display, RunOptions
from saap.settings.setting import Only


def recover(
    model: Annotated[str, Argument("Folder that `saap prune` has written, or any other model.")],
    config: RecoverConfig,
    options: Annotated[RunOptions, Only(("out", "overwrite", "work_dir", "keep_work", *OPENS))],
    display: Display,
) -> None:
    """Tune MODEL on text with quantised weights in little memory, and write it as a plain checkpoint.

    Several processes (torchrun --nproc-per-node N -m saap recover ...) share each batch. Each holds the whole quantised
    model and its teacher; with --shard each holds a part of them.
    """
    if options.out is None:
        raise ConfigurationError("--output-dir is missing", "Name the folder to write with -o DIR")
    from saap.cli.show.output import make_reporter, print_recovery
    from saap.pipeline.recover.run import run_recover

    with make_reporter(quiet=display.quiet, to_stderr=display.as_json) as reporter:
        result = run_recover(model, config, options, reporter)
    if display.as_json:
        print(json.dumps(result.report.as_dict(), indent=1))
    elif not display.quiet:
        print_recovery(result.report)
