"""`saap compare`."""

from __future__ import annotations

from typing import Annotated

from saap.cli.flags import Model
from saap.core.errors import ConfigurationError
from saap.settings.compare import CompareRequest
from saap.settings.run import READS, Display, RunOptions
from saap.settings.setting import Only


def compare(
    model: Model, request: CompareRequest, options: Annotated[RunOptions, Only(("out", *READS))], display: Display
) -> None:
    """Compare methods on MODEL: same calibration, same pruning ratio, one table.

    A second run on the same folder resumes, and adds new methods and ratios.
    """
    if options.out is None:
        raise ConfigurationError("--output-dir is missing", "Specify the folder of rows and tables with -o DIR")
    from saap.cli.show.output import make_reporter, print_comparison, show
    from saap.pipeline.compare.run import compare as run_compare
    from saap.reporting.comparison_tables import comparison_table
    from saap.reporting.tables import write_table

    with make_reporter(display) as reporter:
        result = run_compare(model, request, options, options.out, reporter)
    table = comparison_table(result)
    written = write_table(table, options.out / "comparison")
    show(display, result.model_dump_json(indent=1), lambda: print_comparison(*table, written))
