"""`saap eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from saap.cli.flags import Model
from saap.core.errors import ConfigurationError
from saap.settings.evaluate import EvalRequest, writing_flag
from saap.settings.run import OPENS, OUTPUT, Display, RunOptions, out_flag
from saap.settings.setting import Only, Settings


class EvalOutput(Settings):
    """Flags of the command line alone."""

    generation: Annotated[bool, writing_flag("Measure generated text and known facts.")] = False
    out: Annotated[
        Path | None, out_flag("Also write the report as JSON.", panel=OUTPUT, name="output_file", metavar="FILE")
    ] = None


def evaluate(
    model: Model,
    request: EvalRequest,
    output: EvalOutput,
    options: Annotated[RunOptions, Only(OPENS)],
    display: Display,
) -> None:
    """Measure MODEL: perplexity, zero-shot tasks, generation, conversations, speed."""
    if output.generation and request.prompts is None:
        request = request.model_copy(update={"prompts": "bundled"})
    if request.names_nothing:
        raise ConfigurationError(
            "nothing to measure was requested",
            "Give some of --perplexity, --tasks, --generation, --prompts, --chat, --speed",
        )
    from saap.cli.show.evaluate import print_eval
    from saap.cli.show.output import make_reporter, show
    from saap.export.placing import check_file
    from saap.pipeline.evaluate.run import evaluate_model, write_report

    if output.out is not None:
        check_file(output.out, 0, overwrite=True)
    with make_reporter(display) as reporter:
        report = evaluate_model(model, request, options, reporter).as_dict()
    show(display, report, lambda: print_eval(report))  # first: a report that cannot be written loses nothing
    if output.out is not None:
        write_report(output.out, report)
