"""`saap compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saap.cli.options import AsJson, Bos, Device, Quiet, RoundedTasks


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or `smollm2`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the rows and tables; started again, it goes on.")],
    methods: Annotated[
        str, typer.Option(metavar="M[,M...]", help="Methods, each METHOD or METHOD@ROLE+ROLE to prune these only.")
    ] = "saap,llm-pruner-element2,flap,wanda-sp,magnitude",
    pruning_ratios: Annotated[
        str, typer.Option(metavar="R[,R...]", help="Fractions of the decoder blocks' parameters to remove.")
    ] = "0.1,0.2,0.3",
    seeds: Annotated[str, typer.Option(metavar="N[,N...]", help="Seeds of the calibration samples.")] = "0",
    restore: Annotated[str, typer.Option(help="Restoration by saap, for every method: both, yes or no.")] = "both",
    perplexity: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="Text to measure on, repeatable. [default: bundled]"),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of each window that perplexity is measured in.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the first tokens of each text.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK[,TASK...]", help="Zero-shot tasks, or `paper` for the paper's seven.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with TASK.SPLIT.jsonl files, instead of the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each task.")] = None,
    rounded_tasks: RoundedTasks = False,
    task_ratios: Annotated[
        str | None,
        typer.Option(metavar="R[,R...]", help="Ask the tasks at these ratios only, or `none`. [default: at all]"),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="Text that all methods calibrate on, repeatable. [default: mixed]"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples for the scores.")] = 50,
    sample_length: Annotated[int, typer.Option(help="Tokens of each calibration sample.")] = 128,
    refit_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens for the restoration.")] = None,
    bos: Bos = True,
    roles: Annotated[str, typer.Option(help="What may leave, some of ffn,attention.")] = "ffn,attention",
    align: Annotated[int, typer.Option(help="Kept channels are a multiple of this.")] = 32,
    effort: Annotated[str, typer.Option(help="fast, default or best: of saap's search, and of the restoration.")] = (
        "default"
    ),
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on MODEL: same calibration, same number of parameters, one table."""
    from saap.cli.parsing import choice, parse_methods, parse_ratios, parse_roles, parse_seeds
    from saap.cli.show.compare import print_comparison
    from saap.cli.show.output import make_reporter
    from saap.core.errors import ConfigurationError
    from saap.pipeline.compare.run import compare as run_compare
    from saap.pipeline.shared.inputs import RunOptions
    from saap.reporting.comparison import write_tables
    from saap.settings.measure import CompareRequest, EvalRequest
    from saap.settings.prune import Effort, PruneConfig

    restorations = {"both": (False, True), "yes": (True,), "no": (False,)}
    if restore not in restorations:
        raise ConfigurationError(f"--restore {restore!r} is unknown", f"It takes {', '.join(restorations)}")
    named = () if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    config = PruneConfig(
        pruning_ratios=parse_ratios(pruning_ratios), calibration=tuple(calibration) if calibration else ("mixed",),
        samples=samples, sample_length=sample_length, refit_tokens=refit_tokens, bos=bos, roles=parse_roles(roles),
        align=align, effort=choice("--effort", effort, Effort),
    )  # fmt: skip
    evaluation = EvalRequest(
        texts=tuple(perplexity) if perplexity else ("bundled",), window=window, bos=bos, max_tokens=max_tokens,
        tasks=named, task_data=task_data, limit=limit, rounded=rounded_tasks,
    )  # fmt: skip
    asked_at: tuple[float, ...] | None = None
    if task_ratios is not None:
        asked_at = () if task_ratios == "none" else parse_ratios(task_ratios, "--task-ratios")
    request = CompareRequest(
        methods=parse_methods(methods), config=config, seeds=parse_seeds(seeds),
        restorations=restorations[restore], evaluation=evaluation,
        task_ratios=asked_at,
    )  # fmt: skip
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        result = run_compare(model, request, RunOptions(device=device), out, reporter)
    written = write_tables(out, result)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    elif not quiet:
        print_comparison(result)
        typer.echo(f"wrote {', '.join(str(path) for path in written)}")
