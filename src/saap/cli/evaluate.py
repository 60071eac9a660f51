"""`saap eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.measure import EvalRequest, writing_flag
from saap.settings.run import OPENS, Display, RunOptions, output_flag
from saap.settings.setting import Only, Settings


class EvalOutput(Settings):
    """What the command line adds to a request."""

    generation: Annotated[bool, writing_flag("Let the model write, and measure what it writes and knows.")] = False
    human_ratings: Annotated[
        tuple[Path, ...], writing_flag("Ratings that the page saved, repeatable.", metavar="CSV", repeat=True)
    ] = ()
    human_key: Annotated[
        Path | None, writing_flag("Key of the page.", metavar="FILE", default="the one in the folder of the ratings")
    ] = None
    out: Annotated[
        Path | None,
        output_flag("Also write the report as JSON.", name="output_file", short="-o", aliases=("out",), metavar="FILE"),
    ] = None


def evaluate(
    request: EvalRequest,
    output: EvalOutput,
    options: Annotated[RunOptions, Only(OPENS)],
    display: Display,
    model: Annotated[str | None, Argument("Hub id, folder, .gguf file or `smollm2`; not needed for ratings.")] = None,
) -> None:
    """Measure MODEL: perplexity, zero-shot tasks, generation, conversations, speed, ratings by people."""
    if output.human_ratings:
        _rate(model, output, display)
        return
    if model is None:
        raise ConfigurationError("no MODEL was given", "Name a hub id, a folder or a .gguf file")
    if output.generation and request.prompts is None:
        request = request.model_copy(update={"prompts": "bundled"})
    if request.names_nothing:
        raise ConfigurationError(
            "nothing to measure was named",
            "Give some of --perplexity, --tasks, --generation, --prompts, --chat, --speed, --human-kit, "
            "--human-ratings",
        )
    from saap.cli.show.evaluate import print_eval
    from saap.cli.show.output import make_reporter
    from saap.pipeline.evaluate.run import evaluate_model, write_report

    with make_reporter(quiet=display.quiet, to_stderr=display.as_json) as reporter:
        report = evaluate_model(model, request, options, reporter).as_dict()
    if output.out is not None:
        write_report(output.out, report)
    if display.as_json:
        print(json.dumps(report, indent=1))
    elif not display.quiet:
        print_eval(report)
        if request.human_kit is not None:
            print(f"wrote {request.human_kit}; keep the key beside it from the raters")


def _rate(model: str | None, output: EvalOutput, display: Display) -> None:
    from saap.cli.show.evaluate import print_ratings
    from saap.pipeline.evaluate.run import judge_ratings, write_report

    if model is not None:
        raise ConfigurationError("--human-ratings and MODEL were given together", "Leave out MODEL")
    ratings = judge_ratings(output.human_ratings, output.human_key)
    if output.out is not None:
        write_report(output.out, ratings)
    print(json.dumps(ratings, indent=1)) if display.as_json else print_ratings(ratings)
